"""Addon of mitmproxy: refuses requests whose path matches no pattern. The patterns are the lines of PALISADE_BENCH_PATTERNS."""

import os
import re

from mitmproxy import http

PATTERNS = [re.compile(line) for line in os.environ["PALISADE_BENCH_PATTERNS"].splitlines()]


def request(flow):
    path = flow.request.path.split("?")[0]
    if not any(pattern.fullmatch(path) for pattern in PATTERNS):
        flow.response = http.Response.make(403, b"Access denied\n")
