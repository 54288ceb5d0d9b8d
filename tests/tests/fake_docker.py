"""A Docker Engine API over a Unix socket, as far as Palisade uses it. The file STATE has {"containers": {ID: answer},
"images": {ID: answer}, "mode": "ok" | "hang" | "garbage" | "endless"} and is read at each request.

  fake_docker.py SOCKET STATE
"""

import json
import os
import socketserver
import sys
import time

SOCKET, STATE = sys.argv[1:]


def state():
    with open(STATE, encoding="utf-8") as file:
        return json.load(file)


class Handler(socketserver.StreamRequestHandler):
    def answer(self, status, body):
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.wfile.write(head.encode() + body)

    def chunk(self, data):
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def events(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        known = state()["containers"]
        while True:
            time.sleep(0.02)
            now = state()["containers"]
            for name in known.keys() | now.keys():
                if known.get(name) != now.get(name):
                    event = {"Type": "container", "Action": "x", "Actor": {"ID": name, "Attributes": {}}}
                    self.chunk(json.dumps(event).encode() + b"\n")
            known = now

    def handle(self):
        try:
            while line := self.rfile.readline().decode():
                path = line.split()[1]
                while self.rfile.readline().strip():
                    pass
                self.serve(path)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def serve(self, path):
        now = state()
        mode = now.get("mode", "ok")
        if mode == "hang":
            time.sleep(3600)
        if mode == "garbage":
            self.wfile.write(b"\x00\xff" * 4096)
            return
        if mode == "endless" and path == "/containers/json":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                self.chunk(b" " * (1 << 20))
        parts = path.split("?")[0].strip("/").split("/")
        if parts == ["events"]:
            self.events()
        elif parts == ["containers", "json"]:
            self.answer("200 OK", json.dumps([{"Id": name} for name in now["containers"]]).encode())
        elif len(parts) == 3 and parts[1] in now.get(parts[0], {}):
            self.answer("200 OK", json.dumps(now[parts[0]][parts[1]]).encode())
        else:
            self.answer("404 Not Found", b'{"message":"no such thing"}')


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


if os.path.exists(SOCKET):
    os.unlink(SOCKET)
Server(SOCKET, Handler).serve_forever()
