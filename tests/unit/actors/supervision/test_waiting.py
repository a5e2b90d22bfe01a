"""Waiting for actors: what each way of failing is called. Ray itself is not started."""

from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.supervision.watch import get_all, root_cause
from raylign.errors import GeneratorError, TrainerError, WeightSyncError

REFS: list[Any] = ["ref"]


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("sample", "Traceback (most recent call last): ...", cause)


def failing(error: Exception) -> Callable[..., Any]:
    def get(refs: list[Any], timeout: float) -> Any:
        raise error

    return get


def test_results_come_in_order_under_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], float]] = []

    def get(refs: list[str], timeout: float) -> list[str]:
        asked.append((refs, timeout))
        return [ref.upper() for ref in refs]

    monkeypatch.setattr(ray, "get", get)
    refs: list[Any] = ["a", "b"]
    assert get_all(refs, 2.5, "sampling", GeneratorError) == ["A", "B"]
    assert asked == [(["a", "b"], 2.5)]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GetTimeoutError("late"), "training: no answer within 90 s"),
        (task_error(ValueError("bad shape")), "training: ValueError: bad shape"),
        (task_error(WeightSyncError("limit 3, lower it")), "training: limit 3, lower it"),
        (RayActorError(error_msg="worker died\nlong trace"), "training: the actor died (worker died)"),
    ],
)
def test_every_failure_names_what_was_waited_for(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", failing(error))
    with pytest.raises(TrainerError) as caught:
        get_all(REFS, 90, "training", TrainerError)
    assert str(caught.value) == message and caught.value.__cause__ is error


def test_a_bug_of_the_driver_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", failing(TypeError("refs")))
    with pytest.raises(TypeError, match="refs"):
        get_all(REFS, 90, "training", TrainerError)


def test_the_root_cause_has_type_and_message() -> None:
    assert root_cause(task_error(KeyError("x"))) == "KeyError: 'x'"
    assert root_cause(task_error(GeneratorError("vLLM returned 3 candidates, not 4"))) == (
        "vLLM returned 3 candidates, not 4"
    )
