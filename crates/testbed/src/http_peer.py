"""An HTTP/1.1 server with everything that a real one may say, and a WebSocket client.

http_peer.py serve LOG PORT ADDRESS...   every request is a line of JSON in LOG, written before it is answered
http_peer.py serve-tls LOG CERT KEY PORT ADDRESS...   the same behind TLS
http_peer.py websocket ADDRESS PORT PATH [NAME CA]    upgrades, sends frames and expects them back; with NAME over TLS
"""

import base64
import hashlib
import http.client
import http.server
import json
import os
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time

MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def accepted(key):
    return base64.b64encode(hashlib.sha1((key + MAGIC).encode()).digest()).decode()


def frame(payload, mask=None):
    """One binary frame (RFC 6455, 5.2)."""
    n = len(payload)
    masked = 0x80 if mask else 0
    if n < 126:
        head = struct.pack("!BB", 0x82, masked | n)
    elif n < 65536:
        head = struct.pack("!BBH", 0x82, masked | 126, n)
    else:
        head = struct.pack("!BBQ", 0x82, masked | 127, n)
    if mask:
        key = int.from_bytes((mask * (n // 4 + 1))[:n], "big")
        payload = (int.from_bytes(payload, "big") ^ key).to_bytes(n, "big")
        head += mask
    return head + payload


def read_frame(stream):
    head = stream.read(2)
    if len(head) < 2:
        return None
    n = head[1] & 127
    if n == 126:
        (n,) = struct.unpack("!H", stream.read(2))
    elif n == 127:
        (n,) = struct.unpack("!Q", stream.read(8))
    mask = stream.read(4) if head[1] & 0x80 else None
    payload = stream.read(n)
    if mask:
        key = int.from_bytes((mask * (n // 4 + 1))[:n], "big")
        payload = (int.from_bytes(payload, "big") ^ key).to_bytes(n, "big")
    return payload


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 120
    # what is written at once is sent at once, and headers do not wait for what follows
    wbufsize = 0
    disable_nagle_algorithm = True

    def setup(self):
        if self.server.tls:
            # In the thread of the connection, so that a slow handshake delays no other connection.
            self.request.settimeout(self.timeout)
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def log_message(self, *args):
        pass

    def note(self, **more):
        line = {"method": self.command, "path": self.path, "headers": self.headers.items(), **more}
        line["from"], line["port"] = self.client_address[:2]
        if isinstance(self.connection, ssl.SSLSocket):
            line["server_name"] = getattr(self.connection, "asked_for", None)
            line["tls"], line["alpn"] = self.connection.version(), self.connection.selected_alpn_protocol()
        with self.server.lock:
            self.server.log.write(json.dumps(line) + "\n")
            self.server.log.flush()

    def body(self):
        """Reads the body: bytes, digest, trailers."""
        digest, size, trailers = hashlib.sha256(), 0, {}
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while True:
                n = int(self.rfile.readline(), 16)
                if n == 0:
                    while (line := self.rfile.readline()) not in (b"\r\n", b""):
                        name, _, value = line.decode().partition(":")
                        trailers[name] = value.strip()
                    break
                digest.update(self.rfile.read(n))
                size += n
                self.rfile.readline()
        else:
            left = int(self.headers.get("content-length", 0))
            while left:
                part = self.rfile.read(min(left, 1 << 20))
                if not part:
                    break
                digest.update(part)
                size += len(part)
                left -= len(part)
        return size, digest.hexdigest(), trailers

    def say(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self):
        self.note()
        path, _, query = self.path.partition("?")
        size, digest, trailers = self.body()
        if path.endswith("/chunked"):
            return self.chunked(query)
        if path.endswith("/nothing"):
            return self.say(204)
        if path.endswith("/same"):
            return self.say(304, headers=[("ETag", '"x"'), ("Content-Length", "77")])
        if path.endswith("/hints"):
            self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n")
            return self.say(200, b"after hints\n")
        if path.endswith("/until-close"):
            self.close_connection = True
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            return self.wfile.write(b"until the end\n")
        if path.endswith("/slow"):
            time.sleep(0.3)
            return self.say(200, b"slow\n")
        if path.endswith("/ws"):
            return self.websocket()
        if path.endswith("/liar"):
            # goes over to something that nobody asked for
            self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n")
            self.wfile.write(b"what follows is no HTTP\n")
            self.close_connection = True
            return None
        said = {"method": self.command, "path": self.path, "size": size, "sha256": digest, "trailers": trailers}
        return self.say(200, json.dumps(said).encode() + b"\n", [("Content-Type", "application/json")])

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = answer

    def chunked(self, query):
        count, size = (int(n) for n in (query or "3,1000").split(","))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Trailer", "X-Sum")
        self.end_headers()
        digest = hashlib.sha256()
        for n in range(count):
            part = bytes([65 + n % 26]) * size
            digest.update(part)
            self.wfile.write(b"%x\r\n%s\r\n" % (size, part))
        self.wfile.write(b"0\r\nX-Sum: %s\r\n\r\n" % digest.hexdigest().encode())

    def websocket(self):
        key = self.headers.get("Sec-WebSocket-Key")
        if self.headers.get("Upgrade", "").lower() != "websocket" or not key:
            return self.say(426, b"upgrade\n", [("Upgrade", "websocket")])
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accepted(key))
        self.end_headers()
        self.close_connection = True
        while (payload := read_frame(self.rfile)) is not None:
            self.wfile.write(frame(payload))
        return None

    def do_CONNECT(self):
        self.note()
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        while data := self.connection.recv(65536):
            self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, address, port, log, lock, tls):
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.log, self.lock, self.tls = log, lock, tls
        super().__init__((address, port), Handler)

    def server_bind(self):
        # without looking for a name of the address: there is nobody to ask
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]


def serve_tls(log, cert, key, port, *addresses):
    def note_name(link, name, _):
        link.asked_for = name

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["http/1.1"])
    context.sni_callback = note_name
    serve(log, port, *addresses, tls=context)


def serve(log, port, *addresses, tls=None):
    log, lock = open(log, "a"), threading.Lock()
    threads = []
    for address in addresses:
        server = Server(address, int(port), log, lock, tls)
        threads.append(threading.Thread(target=server.serve_forever))
        threads[-1].start()
    print("ready", flush=True)
    for thread in threads:
        thread.join()


def websocket(address, port, path, name=None, ca=None):
    link = socket.create_connection((address, int(port)), timeout=5)
    host = f"[{address}]" if ":" in address else address
    if name:
        host = name
        link = ssl.create_default_context(cafile=ca).wrap_socket(link, server_hostname=name)
    key = base64.b64encode(os.urandom(16)).decode()
    link.sendall(
        f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    stream = link.makefile("rb")
    status = stream.readline().decode().strip()
    fields = http.client.parse_headers(stream)
    print(status)
    if not status.startswith("HTTP/1.1 101"):
        print(stream.read(int(fields.get("Content-Length", 0))).decode())
        return
    assert fields["Sec-WebSocket-Accept"] == accepted(key)
    total = 0
    # what looks like a request stays a frame
    for payload in [b"hello", b"GET /denied HTTP/1.1\r\n\r\n", os.urandom(200), os.urandom(70_000)] * 5:
        link.sendall(frame(payload, os.urandom(4)))
        assert read_frame(stream) == payload
        total += len(payload)
    print("echoed", total)


if __name__ == "__main__":
    {"serve": serve, "serve-tls": serve_tls, "websocket": websocket}[sys.argv[1]](*sys.argv[2:])
