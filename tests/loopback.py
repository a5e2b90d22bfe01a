"""An HTTP server of a test's own, in this process."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass(frozen=True)
class Posted:
    """One request as the server got it."""

    body: Mapping[str, Any]
    authorization: str = ""
    path: str = ""


@dataclass(frozen=True)
class Sent:
    """What the server sends; with `drip_s` byte by byte, one every so many seconds."""

    payload: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    drip_s: float = 0.0


@contextmanager
def loopback(answer: Callable[[Posted], Sent]) -> Iterator[str]:
    """Answers POSTs of JSON on a free port of the loopback interface; gives the URL without a path."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent = answer(Posted(body, self.headers.get("Authorization", ""), self.path))
            payload = sent.payload
            self.send_response(sent.status)
            for name, value in {"Content-Length": str(len(payload)), **sent.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):
                for piece in [payload] if not sent.drip_s else [payload[i : i + 1] for i in range(len(payload))]:
                    self.wfile.write(piece)
                    time.sleep(sent.drip_s)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
