#!/usr/bin/env python3
"""Writes stories.txt: header blocks of an independent HPACK encoder (PyPI `hpack`), with the fields that they encode.

  python3 generate.py > stories.txt

A story is one connection. Its lines: `story`, `block HEX`, `field NAME VALUE`, `sensitive NAME VALUE` (names and values in
hexadecimal, `-` if empty), `limit BYTES` (SETTINGS_HEADER_TABLE_SIZE, acknowledged before the next block).
"""

import random

from hpack import Decoder, Encoder, HeaderTuple, NeverIndexedHeaderTuple

RANDOM = random.Random(7541)
NAMES = [":method", ":path", ":scheme", ":authority", "accept", "accept-encoding", "cookie", "user-agent", "x-request-id",
         "grpc-timeout", "content-type", "content-length", "authorization", "te", "traceparent", "x-empty"]
VALUES = {
    ":method": ["GET", "POST", "PUT", "CONNECT"],
    ":path": ["/", "/index.html", "/v1/buckets?list=2", "/pkg.Service/Method", "/" + "a/" * 60],
    ":scheme": ["http", "https"],
    ":authority": ["api.example", "api.example:8443", "[fd00::1]:80"],
}


def value_of(name):
    if name in VALUES:
        return RANDOM.choice(VALUES[name])
    kind = RANDOM.randrange(4)
    if kind == 0:
        return ""
    if kind == 1:
        return "".join(chr(RANDOM.randrange(32, 127)) for _ in range(RANDOM.randrange(1, 40))).strip()
    if kind == 2:
        return RANDOM.choice(["trailers", "application/grpc", "gzip, deflate", "12345", "curl/8.14.1"])
    # Bytes beyond ASCII have the longest codes.
    return "".join(chr(RANDOM.randrange(128, 256)) for _ in range(RANDOM.randrange(1, 24)))


def text(value):
    return value.encode("latin-1").hex() or "-"


for story in range(9):
    print("story")
    encoder, decoder = Encoder(), Decoder()
    huffman = story % 3 != 0
    for _ in range(8):
        if RANDOM.randrange(6) == 0:
            limit = RANDOM.choice([0, 64, 256, 1000, 4096])
            encoder.header_table_size = decoder.max_allowed_table_size = limit
            print("limit", limit)
        fields = []
        for name in RANDOM.sample(NAMES, RANDOM.randrange(0, 12)):
            make = NeverIndexedHeaderTuple if RANDOM.randrange(6) == 0 else HeaderTuple
            value = value_of(name)
            fields.append(make(name.encode(), value.encode("latin-1")))
        block = encoder.encode(fields, huffman=huffman)
        # Blocks are printed in hexadecimal, and an empty block has no digits.
        print("block", block.hex() or "-")
        # The encoder writes an entry of the static table as indexed, even if the field is sensitive.
        for field in decoder.decode(block, raw=True):
            word = "field" if field.indexable else "sensitive"
            print(word, field[0].hex() or "-", field[1].hex() or "-")
