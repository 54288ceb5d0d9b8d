"""A server as careless as some real ones: takes a line feed as the end of a line, folds names of fields as CGI does,
reads no body but that of POST, PUT and PATCH, and goes over to HTTP/2 where any Upgrade field says so.

careless.py LOG PORT ADDRESS...   a line in LOG for each request line, body and whatever comes behind a 101
"""

import socket
import sys
import threading

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"
log, lock = open(sys.argv[1], "a", buffering=1), threading.Lock()


def note(text):
    with lock:
        log.write(text + "\n")


def folded(name):
    return "".join(c if c.isalnum() else "-" for c in name.strip().lower()).strip("-")


def head(stream):
    fields = {}
    while True:
        line = stream.readline(65536)
        if not line:
            return None
        line = line.strip().decode("latin-1")
        if not line:
            return fields
        name, _, value = line.partition(":")
        name = folded(name)
        fields[name] = fields[name] + "," + value if name in fields else value


def body(stream, fields):
    size = 0
    if "chunked" in fields.get("transfer-encoding", ""):
        while n := int(stream.readline().split(b";")[0].strip(), 16):
            size += len(stream.read(n))
            stream.readline()
        while stream.readline().strip():
            pass
    else:
        size = len(stream.read(int(fields.get("content-length", "0").split(",")[0])))
    return size


def serve(link):
    stream = link.makefile("rb")
    while line := stream.readline(65536):
        line = line.strip().decode("latin-1")
        if not line:
            continue
        note("request " + line)
        fields = head(stream)
        if fields is None:
            return
        method, path, _ = (line + "  ").split(" ", 2)
        upgrade = fields.get("upgrade", "").lower()
        for protocol in ["h2c", "websocket"]:
            if protocol in upgrade and not path.endswith("/plain"):
                link.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "
                             + protocol.encode() + b"\r\n\r\n")
                while more := stream.read1(65536):
                    note(f"behind {protocol} {more!r}")
                return
        early = path.endswith("/early")
        if early or method == "HEAD":
            link.sendall(OK if method != "HEAD" else OK[:-3])
        if method in ("POST", "PUT", "PATCH"):
            if not path.endswith("/unread"):
                note(f"body {path} {body(stream, fields)}")
        if not early and method != "HEAD":
            link.sendall(OK)


def guarded(link):
    try:
        serve(link)
    except (OSError, ValueError) as error:
        note(f"error {error}")
    finally:
        link.close()


def listen(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.create_server((address, port), family=family, backlog=128)
    while True:
        link, _ = server.accept()
        threading.Thread(target=guarded, args=(link,), daemon=True).start()


threads = [threading.Thread(target=listen, args=(a, int(sys.argv[2]))) for a in sys.argv[3:]]
for thread in threads:
    thread.start()
print("ready", flush=True)
