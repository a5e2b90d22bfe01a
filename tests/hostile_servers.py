"""Servers that send whatever they are told to, be it HTTP or not."""

import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

Pieces = Callable[[], Iterable[bytes]]


@contextmanager
def sending(pieces: Pieces) -> Iterator[str]:
    """The address of a server that reads a request on every connection, sends `pieces` as they come, and hangs up."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                length = 0
                while line := self.rfile.readline().strip():
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                self.rfile.read(length)
                for piece in pieces():
                    self.wfile.write(piece)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def whole(body: bytes, *headers: str, status: int = 200, length: bool = True) -> Pieces:
    """One answer. With `length` it says how long it is."""
    lines = [f"HTTP/1.1 {status} X", *headers, *([f"Content-Length: {len(body)}"] if length else ["Connection: close"])]
    return lambda: [("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"), body]


def endless(start: bytes, piece: bytes, every_s: float = 0.0) -> Pieces:
    """`start`, then `piece` again and again."""

    def pieces() -> Iterator[bytes]:
        yield start
        while True:
            time.sleep(every_s)
            yield piece

    return pieces


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
NEVER_WHOLE = {
    "body, a byte now and then": endless(HEAD + b"Content-Length: 1000000\r\n\r\n", b" ", 0.02),
    "headers, a line now and then": endless(HEAD, b"X: y\r\n", 0.02),
    "status line, a byte now and then": endless(b"HTTP/1.1 200 ", b"O", 0.02),
    "promises to go on": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02),
}
"""Answers that come all the time and never end."""
