"""Every wait has a deadline, and errors name what was waited for; a watch finds who dies while nobody waits."""

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors.supervision.cures import Role, cure_of
from actors.supervision.endings import Loss, ending, explains, one_line
from raylign.errors import ActorsLost, GeneratorError, RaylignError, ScorerError, TrainerError

T = TypeVar("T")
_SETTLE_S = 3.0
"""How long after a failure the others may take to show its cause."""
_ROLES: dict[type[RaylignError], Role] = {GeneratorError: "generator", TrainerError: "trainer", ScorerError: "scorer"}

log = logging.getLogger(__name__)
_JOIN_S = 10.0
P = ParamSpec("P")


def get_all(refs: Sequence[ObjectRef[T]], timeout_s: float, what: str, error: type[RaylignError]) -> list[T]:
    """Results of `refs` in order. Raises `error` when one fails, dies, or `timeout_s` passes for all of them."""
    try:
        return list(ray.get(list(refs), timeout=timeout_s))
    except RayError as cause:
        raise failure(cause, timeout_s, what, error) from cause


def get_together(refs: Sequence[ObjectRef[T]], timeout_s: float, what: str, error: type[RaylignError]) -> list[T]:
    """Results of calls that need each other, in order; ends with the first that fails.

    Raises ActorsLost when an actor is gone, also where another one's failure is seen first and that explains it, or
    when one has not answered within `timeout_s`; else `error` with what was raised.
    """
    waiting, deadline = list(refs), time.monotonic() + timeout_s
    failures: list[RayError] = []
    while waiting and not failures:
        left = max(0.0, deadline - time.monotonic())
        done, waiting = ray.wait(waiting, num_returns=1, timeout=left)
        if not done:
            limit = f" within {timeout_s:g} s" if timeout_s else ""
            raise ActorsLost(f"{what}: {len(waiting)} of {len(refs)} did not answer{limit}")
        failures += _failures(done)
    if not failures:
        return list(ray.get(list(refs)))
    done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=_SETTLE_S) if waiting else ([], [])
    failures += _failures(done)
    losses = [(failure, loss) for failure in failures if (loss := ending(failure))]
    if losses:
        cause, loss = min(losses, key=lambda pair: explains(pair[1]))
        raise ActorsLost(f"{what}: {loss.cause}") from cause
    raise failure(failures[0], timeout_s, what, error) from failures[0]


def failure(cause: RayError, timeout_s: float, what: str, error: type[RaylignError]) -> RaylignError:
    """The error of a role for Ray's, in one line, with its cure."""
    role = _ROLES.get(error, "cluster")
    if isinstance(cause, GetTimeoutError):
        return error(f"{what}: no answer within {timeout_s:g} s")
    loss = ending(cause)
    if loss is None and isinstance(cause, RayTaskError):
        found = error(f"{what}: {root_cause(cause)}")
        own = cause.cause if isinstance(cause.cause, RaylignError) else None
        found.cure = own.cure if own else cure_of(role, f"{type(cause.cause).__name__}: {cause.cause}")
        return found
    text = loss.cause if loss else f"{type(cause).__name__}: {one_line(str(cause))}"
    return cured(error(f"{what}: {text}"), loss, role)


def cured(found: RaylignError, loss: Loss | None, role: Role) -> RaylignError:
    """The error with the cure of what its message tells."""
    found.cure = cure_of(role, "out of memory" if loss and loss.kind == "memory" else str(found))
    return found


def _failures(refs: Sequence[Any]) -> list[RayError]:
    found = []
    for ref in refs:
        try:
            ray.get(ref, timeout=_SETTLE_S)
        except RayError as failure:
            found.append(failure)
    return found


def root_cause(error: RayTaskError) -> str:
    """`Type: message` of what was raised inside the actor."""
    cause: BaseException = error.cause if isinstance(error.cause, BaseException) else error
    if isinstance(cause, RaylignError):
        return str(cause)
    return f"{type(cause).__name__}: {one_line(str(cause))}"


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
