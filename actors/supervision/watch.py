"""A look at the actors that nobody is using: a dead one is noticed and replaced before it is needed."""

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from ray.exceptions import RayError

from raylign.errors import ActorsLost, RaylignError

log = logging.getLogger(__name__)

_JOIN_S = 10.0
P = ParamSpec("P")
T = TypeVar("T")


class Guard:
    """A lock on the actors of a role: whoever works with them notices a death himself, else the watch does."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._failures: list[RaylignError] = []
        self._closed = threading.Event()

    def close(self) -> None:
        """Whoever waits for a replacement stops to: the role is being taken down."""
        self._closed.set()

    def sleep(self, seconds: float) -> None:
        """Raises ActorsLost once the role is being taken down."""
        if self._closed.wait(seconds):
            raise ActorsLost("the role is being taken down")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Raises what the watch could not put right."""
        with self._lock:
            if self._failures:
                raise self._failures.pop()
            yield

    def if_free(self, look: Callable[[], None]) -> None:
        """Call `look` unless somebody is at work."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            look()
        except RaylignError as error:
            self._failures.append(error)
        except RayError as error:
            log.warning("the watch over idle actors: %s: %s", type(error).__name__, error)
        finally:
            self._lock.release()


class Replaceable(Protocol):
    """A role whose actors are replaced when they die."""

    @property
    def guard(self) -> Guard: ...

    def replace_dead(self) -> None:
        """Replace the actors that are dead; called while nobody uses any."""
        ...


R = TypeVar("R", bound=Replaceable)


def guarded(method: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
    """A method of a role that works with its actors."""

    @functools.wraps(method)
    def call(self: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.guard.in_use():
            return method(self, *args, **kwargs)

    return call


@contextmanager
def watched(roles: Sequence[Replaceable], every_s: float) -> Iterator[None]:
    """Look at every role each `every_s` seconds, in a thread of its own: replacing one may take a while."""
    stop = threading.Event()
    threads = [threading.Thread(target=_watch, args=(role, every_s, stop), name="watch", daemon=True) for role in roles]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for role in roles:
            role.guard.close()
        for thread in threads:
            thread.join(_JOIN_S)


def _watch(role: Replaceable, every_s: float, stop: threading.Event) -> None:
    while not stop.wait(every_s):
        role.guard.if_free(role.replace_dead)
