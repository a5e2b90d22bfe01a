"""Reward services for tests: an HTTP server in this process."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any


@dataclass(frozen=True)
class Posted:
    """One request as the service got it."""

    body: Mapping[str, Any]
    authorization: str = ""
    path: str = ""


@dataclass(frozen=True)
class Answer:
    """What the service sends: `body` as JSON, or `raw` as it is."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: str = ""


Service = Callable[[Posted], Answer]


@dataclass
class Running:
    """A running service and what it was asked; `released` ends the waits of one that hangs."""

    url: str
    asked: list[Posted]
    released: Event


@contextmanager
def running(service: Service) -> Iterator[Running]:
    """Answers POST with what `service` says, on a free port of the loopback interface."""
    asked: list[Posted] = []
    released = Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            posted = Posted(body, self.headers.get("Authorization", ""), self.path)
            asked.append(posted)
            answer = service(posted)
            payload = (answer.raw or json.dumps(answer.body)).encode()
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(payload)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield Running(f"http://127.0.0.1:{server.server_port}/get_reward", asked, released)
    finally:
        released.set()
        server.shutdown()
        server.server_close()
