"""Reward services for tests: an HTTP server in this process."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from tests.loopback import Posted, Sent, loopback


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

    def answer(posted: Posted) -> Sent:
        asked.append(posted)
        given = service(posted)
        return Sent((given.raw or json.dumps(given.body)).encode(), given.status, given.headers)

    with loopback(answer) as url:
        try:
            yield Running(f"{url}/get_reward", asked, released)
        finally:
            released.set()
