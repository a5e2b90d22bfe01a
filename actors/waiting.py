"""Every wait has a deadline. Errors name what was waited for."""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from raylign.errors import ActorsLost, RaylignError

_SETTLE_S = 3.0
"""How long after a failure the others may take to show its cause."""


def get_all(refs: Sequence[Any], timeout_s: float, what: str, error: type[RaylignError]) -> list[Any]:
    """Results of `refs` in order. Raises `error` when one fails, dies, or `timeout_s` passes for all of them."""
    try:
        return list(ray.get(list(refs), timeout=timeout_s))
    except GetTimeoutError as cause:
        raise error(f"{what}: no answer within {timeout_s:g} s") from cause
    except RayTaskError as cause:
        raise error(f"{what}: {root_cause(cause)}") from cause
    except RayActorError as cause:
        raise error(f"{what}: the actor died ({cause.error_msg.splitlines()[0]})") from cause
    except RayError as cause:
        raise error(f"{what}: {type(cause).__name__}: {cause}") from cause


def get_together(refs: Sequence[Any], timeout_s: float, what: str, error: type[RaylignError]) -> list[Any]:
    """Results of calls that need each other, in order; ends with the first that fails.

    Raises ActorsLost when an actor has died, also where another one's failure is seen first and the death explains it,
    or when one has not answered within `timeout_s`; else `error` with what was raised.
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
    deaths = [failure for failure in failures if isinstance(failure, RayActorError)]
    if deaths:
        raise ActorsLost(f"{what}: the actor died ({_cause_of(deaths[0])})") from deaths[0]
    cause = failures[0]
    text = root_cause(cause) if isinstance(cause, RayTaskError) else f"{type(cause).__name__}: {cause}"
    raise error(f"{what}: {text}") from cause


def _cause_of(death: RayActorError) -> str:
    """Ray's first line, and what the constructor raised if that ended the actor."""
    lines = [line.strip() for line in death.error_msg.splitlines() if line.strip()]
    return f"{lines[0]} {lines[-1]}" if "creation task" in lines[0] else lines[0]


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
    return f"{type(cause).__name__}: {cause}"
