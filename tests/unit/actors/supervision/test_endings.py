"""Every way in which Ray says that an actor ended, with Ray's own classes; Ray itself is not started."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    TaskCancelledError,
    WorkerCrashedError,
)

from actors.supervision.cures import MEMORY_CURES
from actors.supervision.endings import Kind, ended, ending, loss_of, memory_report, raised_in
from actors.supervision.watch import get_all, get_together
from raylign.errors import ActorsLost, GeneratorError, RaylignError, ScorerError, TrainerError

PROTOCOL: Any = importlib.import_module("ray.core.generated.common_pb2")
ActorDeathCause = PROTOCOL.ActorDeathCause
JOB, OTHER = "01000000", "02000000"
TRAINER, GENERATOR, STRANGER = f"{'e4' * 12}{JOB}", f"{'10' * 12}{JOB}", f"{'77' * 12}{OTHER}"
REPORT = f"""\
2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.2, ID: 0ffe48f1) was \
3.07GB used / 23.54GB limit (0.130527)
OOM kill reason: Memory usage 3080048640B exceeded threshold of 3058403584B (12.1% of 25276063744B limit)
Object store memory usage: [- objects spillable: 0
(global lru) bytes evicted: 0]
Ray killed 2 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Actor({GENERATOR}): job ID={JOB}, lease ID=01, task name=Generator.__init__, required \
resources={{}}, pid=9111, actual memory used=0.25GB, worker ID=d0c8)
Selected to kill: (Actor({STRANGER}): job ID={OTHER}, lease ID=02, task name=A.__init__, required resources={{}}, \
pid=9110, actual memory used=0.50GB, worker ID=8791)
(Actor({TRAINER}): job ID={JOB}, lease ID=03, task name=TrainerRank.__init__, required resources={{}}, pid=9112, \
actual memory used=1.00GB, worker ID=8792)
]
Total non-selected idle workers: 0
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
7881\t1.32\tpython neighbour.py
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/...
"""
"""As Ray 2.60 writes it, shortened."""
INIT = """\
The actor died because of an error raised in its creation task, \x1b[36mray::Generator.__init__()\x1b[39m (pid=7)
  File "/x/actors/generator/actor.py", line 162, in __init__
    self._engine = AsyncLLM.from_engine_args(engine_args(spec))
                   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (9000) is greater than the derived max_model_len"""

REFS: list[Any] = ["a", "b", "c"]


DEAD_NODE = "The actor died because its node has died. Node Id: 0f\n\tthe actor's node was"


def died(message: str, **more: Any) -> ActorDiedError:
    return ActorDiedError(
        PROTOCOL.ActorDiedErrorContext(
            class_name="TrainerRank", actor_id=bytes.fromhex(TRAINER), pid=7, error_message=message, **more
        )
    )


def preempted() -> ActorDiedError:
    info = PROTOCOL.NodeDeathInfo(reason=PROTOCOL.NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED, reason_message="spot")
    return died(f"{DEAD_NODE} preempted: spot", node_death_info=info)


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("f", "Traceback (most recent call last):\n  File 'x'\n", cause, "ray::A.f", 7, "10.0.0.2")


EXIT = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: gone"
LOSSES: list[tuple[RayError, Kind, str]] = [
    (OutOfMemoryError(REPORT), "memory", "Ray's memory monitor ended it: 3.1 of 25.3 GB of its node were in use"),
    (died(EXIT), "process", "the actor died (The actor is dead because its worker process has died"),
    (died(f"{DEAD_NODE} terminated unexpectedly: late"), "node", "its node is gone (terminated unexpectedly)"),
    (preempted(), "node", "the actor died: its node was taken away (preempted)"),
    (died("The actor is dead because its owner has died. Owner Id: 0f"), "process", "its owner has died"),
    (died("The actor is dead because it was killed by `ray.kill`."), "process", "it was killed by `ray.kill`"),
    (died("The actor exited intentionally by exit_actor()."), "process", "exited intentionally"),
    (ActorUnavailableError("connection reset", bytes.fromhex(TRAINER)), "process", "cannot be reached"),
    (RayActorError(error_msg="worker died\nlong trace"), "process", "the actor died (worker died)"),
    (NodeDiedError("Task failed due to the node dying.\nmore"), "node", "its node is gone (Task failed due to"),
    (OwnerDiedError("ab", None, ""), "node", "its node is gone"),
    (WorkerCrashedError(), "process", "its process ended"),
    (TaskCancelledError(), "process", "its process ended"),
    (RuntimeEnvSetupError("no agent\n" * 50), "start", "its environment could not be set up: no agent no agent"),
    (RayActorError(error_msg=INIT, actor_init_failed=True), "start", "ValidationError: 1 validation error for Model"),
    (task_error(died(EXIT)), "process", "an actor that it needs is gone"),
]


@pytest.mark.parametrize(("error", "kind", "text"), LOSSES, ids=lambda value: type(value).__name__)
def test_every_loss_is_told_in_one_line(error: RayError, kind: Kind, text: str) -> None:
    loss = ending(error)
    assert loss is not None and loss.kind == kind
    assert text in loss.cause and "\n" not in loss.cause and len(loss.cause) < 420


@pytest.mark.parametrize(
    "error", [task_error(KeyError("x")), LocalRayletDiedError(), ObjectStoreFullError(), OutOfDiskError()]
)
def test_what_no_replacement_puts_right_is_no_loss(error: RayError) -> None:
    assert ending(error) is None


def test_the_monitors_report_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    report = memory_report(REPORT)
    assert report is not None
    assert (report.node, report.used, report.threshold, report.limit) == (
        "0ffe48f1",
        3080048640,
        3058403584,
        25276063744,
    )
    assert report.held == {GENERATOR: 0.25 * 2**30, STRANGER: 0.5 * 2**30, TRAINER: 2**30}
    assert report.ended == {GENERATOR, STRANGER}
    assert report.ours(JOB) == 1.25 * 2**30 and report.wanted(JOB) == 0.25 * 2**30


def test_a_report_written_otherwise_is_still_a_lack_of_memory() -> None:
    loss = ending(OutOfMemoryError("Task was killed due to the node running low on memory.\nmore"))
    assert loss is not None and (loss.kind, loss.report) == ("memory", None)
    assert loss.cause == "Ray's memory monitor ended it (Task was killed due to the node running low on memory.)"


def test_an_actor_nobody_asked_tells_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Handle:
        class _actor_id:
            @staticmethod
            def hex() -> str:
                return TRAINER

    oom, plain = ActorDeathCause(), ActorDeathCause()
    oom.oom_context.error_message = REPORT
    plain.actor_died_error_context.error_message = EXIT
    known: dict[str, Any] = {"State": "ALIVE", "DeathCause": ActorDeathCause()}
    monkeypatch.setattr("actors.supervision.endings.state.actors", lambda actor: known)
    handle: Any = Handle()
    assert ended(handle) is None
    known |= {"State": "DEAD", "DeathCause": oom}
    found = ended(handle)
    assert found is not None and found.kind == "memory" and found.report is not None
    known["DeathCause"] = plain
    found = ended(handle)
    assert found is not None and (found.kind, found.cause) == ("process", f"its process is gone ({EXIT})")
    plain.actor_died_error_context.error_message = f"{DEAD_NODE} terminated: late"
    assert (ended(handle) or found).kind == "node"
    known["DeathCause"] = ActorDeathCause()
    assert (ended(handle) or found).cause == "its process is gone"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            INIT,
            "ValidationError: 1 validation error for ModelConfig Value error, User-specified max_model_len (9000) is",
        ),
        ('x\n  File "a.py", line 1, in f\n    f()\nraylign.errors.TrainerError: lower it', "lower it"),
        ('x\n  File "a.py", line 1, in f\n    f()\nKeyError: 7', "KeyError: 7"),
        ('x\n  File "a.py", line 1, in f\nAssertionError', "AssertionError"),
        ("no traceback at all", "no traceback at all"),
    ],
)
def test_what_a_constructor_raised_is_found_below_its_traceback(text: str, expected: str) -> None:
    assert raised_in(text).startswith(expected)


class Calls:
    """Refs whose answers are what they name."""

    def __init__(self, answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self._answers = answers
        monkeypatch.setattr(ray, "get", self._get)
        monkeypatch.setattr(
            ray, "wait", lambda refs, num_returns=1, timeout=0: (refs[:num_returns], refs[num_returns:])
        )

    def _get(self, refs: Any, timeout: float = 0) -> Any:
        if isinstance(refs, list):
            return [self._get(ref) for ref in refs]
        if isinstance(answer := self._answers[refs], Exception):
            raise answer
        return answer


def test_the_monitor_explains_the_failure_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose peer is gone raises; what counts is that the node had no memory left."""
    answers = {"a": task_error(RuntimeError("peer gone")), "b": died(EXIT), "c": OutOfMemoryError(REPORT)}
    Calls(answers, monkeypatch)
    with pytest.raises(ActorsLost, match="an optimizer step: Ray's memory monitor ended it") as caught:
        get_together(REFS, 1.0, "an optimizer step", TrainerError)
    loss = loss_of(caught.value)
    assert loss.kind == "memory" and loss.report is not None and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "error", "cure"),
    [
        (task_error(ValueError("not enough KV\n\ncache blocks")), GeneratorError, "generators.kv_cache_gb"),
        (task_error(MemoryError()), TrainerError, MEMORY_CURES["trainer"]),
        (task_error(RuntimeError("CUDA out of memory. Tried")), ScorerError, "scoring.batch_size"),
        (task_error(RuntimeError("Error building extension 'cpu_adam'")), TrainerError, "raylign doctor"),
        (OutOfMemoryError(REPORT), TrainerError, MEMORY_CURES["trainer"]),
        (ObjectStoreFullError(), TrainerError, "/dev/shm"),
        (OutOfDiskError(), TrainerError, "space"),
        (task_error(RuntimeError("anything")), TrainerError, "the same command again"),
    ],
)
def test_an_error_of_a_role_has_one_line_and_a_cure(
    raised: RayError, error: type[RaylignError], cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = f"{type(raised.cause).__name__}: " if isinstance(raised, RayTaskError) else ""
    Calls({"a": raised}, monkeypatch)
    with pytest.raises(error) as caught:
        get_all(REFS[:1], 1.0, "starting", error)
    assert str(caught.value).startswith(f"starting: {inside}") and "\n" not in str(caught.value)
    assert cure in caught.value.cure and caught.value.__cause__ is raised


def test_the_cure_of_our_own_error_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    own = TrainerError("limit 3")
    own.cure = "lower it"
    Calls({"a": task_error(own)}, monkeypatch)
    with pytest.raises(TrainerError, match="training: limit 3") as caught:
        get_all(REFS[:1], 1.0, "training", TrainerError)
    assert caught.value.cure == "lower it"


FIELDS: list[tuple[Callable[[], object], tuple[str, ...]]] = [
    (lambda: died(EXIT), ("error_msg", "actor_id", "actor_init_failed", "preempted")),
    (lambda: OutOfMemoryError("x"), ("message",)),
    (lambda: NodeDiedError("x"), ("message",)),
    (lambda: RuntimeEnvSetupError("x"), ("error_message",)),
    (lambda: task_error(KeyError("x")), ("cause", "traceback_str", "pid")),
]


@pytest.mark.parametrize(("make", "names"), FIELDS)
def test_rays_errors_have_the_fields_that_are_read(make: Callable[[], object], names: tuple[str, ...]) -> None:
    assert all(hasattr(make(), name) for name in names)


def test_rays_death_causes_are_those_that_are_told_apart() -> None:
    """A further one would be taken for the end of a process: look at it, then add it here."""
    assert [field.name for field in ActorDeathCause.DESCRIPTOR.fields] == [
        "creation_task_failure_context",
        "runtime_env_failed_context",
        "actor_died_error_context",
        "actor_unschedulable_context",
        "oom_context",
    ]
    assert died("x").error_msg.splitlines()[0] == ActorDiedError.BASE_ERROR_MSG
