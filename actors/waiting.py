"""Every wait has a deadline. Errors name what was waited for."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from raylign.errors import RaylignError


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


def root_cause(error: RayTaskError) -> str:
    """`Type: message` of what was raised inside the actor."""
    cause: BaseException = error.cause if isinstance(error.cause, BaseException) else error
    if isinstance(cause, RaylignError):
        return str(cause)
    return f"{type(cause).__name__}: {cause}"
