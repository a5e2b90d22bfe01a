"""The three supervisors when Ray's memory monitor ends what they look after. Ray itself is not started."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError

from actors.scorer.client import ScorerClient
from actors.supervision.generators import SupervisedGenerators
from actors.supervision.incidents import Incidents
from actors.supervision.node_memory import MemoryUsage, NodeMemory
from actors.supervision.slot import Supervision
from actors.supervision.trainers import SupervisedTrainers
from raylign.config.blocks import GeneratorsBlock, RecoveryBlock, TrainerBlock
from raylign.config.losses import SftLossBlock
from raylign.config.reference import NoReferenceBlock
from raylign.config.scoring import FunctionScoringBlock
from raylign.errors import GeneratorError, ScorerError, TrainerError
from raylign.records import Candidate, Prompt, Score
from raylign.roles import Generator, ScoredBatch
from raylign.run.checkpoints import Metrics
from raylign.sampling.decoding import Decoding
from tests.unit.actors.supervision.test_endings import INIT, REPORT

GB = 1e9
OOM = OutOfMemoryError(REPORT)
BROKEN = RayActorError(error_msg=INIT, actor_init_failed=True)


class Ref:
    """What a call answers, known at once."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


class Handle:
    """An actor whose methods answer what `answers` says, once for each call; the last answer is kept."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {name: list(given) if isinstance(given, list) else [given] for name, given in answers.items()}
        self.asked: list[str] = []

    class _actor_id:
        @staticmethod
        def hex() -> str:
            return "00"

    def __getattr__(self, name: str) -> Any:
        handle = self

        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Ref:
                handle.asked.append(name)
                given = handle.answers.get(name, [None])
                answer = given.pop(0) if len(given) > 1 else given[0]
                return Ref(answer(*arguments) if callable(answer) else answer)

        return Method


class Node(NodeMemory):
    """A node that is full as often as it is told to be, then has room; before the run half a GB was in use."""

    def __init__(self, full: int = 0) -> None:
        super().__init__()
        self._at_start = {"0ffe48f1": MemoryUsage(0.5 * GB, 25 * GB, 0)}
        self.full, self.looks = full, 0

    def now(self, node: str) -> MemoryUsage | None:
        self.looks += 1
        return MemoryUsage((3.0 if self.looks <= self.full else 1.5) * GB, 25 * GB, 0)


@dataclass
class Desk:
    """Incidents and what they put on record, with a clock that jumps."""

    node: Node = field(default_factory=Node)
    seen: list[tuple[str, str]] = field(default_factory=list)
    recovery: RecoveryBlock = field(default_factory=RecoveryBlock)

    def incidents(self) -> Incidents:
        made = Incidents(self.recovery, self._put)
        made.memory = self.node
        return made

    def _put(self, role: str, happened: str, detail: Mapping[str, Any]) -> None:
        self.seen.append((happened, detail.get("kind", "")))


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Calls answer at once, and time passes only where somebody sleeps."""
    now = [0.0]

    def get(refs: Any, timeout: float = 0) -> Any:
        if isinstance(refs, list):
            return [get(ref) for ref in refs]
        if isinstance(refs.answer, Exception):
            raise refs.answer
        return refs.answer

    def wait(refs: Sequence[Ref], num_returns: int = 1, timeout: float = 0) -> tuple[list[Ref], list[Ref]]:
        done = [ref for ref in refs if not isinstance(ref.answer, GetTimeoutError)]
        return done[:num_returns], [ref for ref in refs if ref not in done[:num_returns]]

    def sleep(guard: Any, seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "kill", lambda handle: None)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr("ray._private.state.actors", lambda actor: {})
    monkeypatch.setattr("actors.supervision.watch.Guard.sleep", sleep)
    for module in ("node_memory", "incidents", "generators"):
        monkeypatch.setattr(f"actors.supervision.{module}.time.monotonic", lambda: now[0])
    yield now


PROMPTS = [Prompt(f"p{index}", (), (1,)) for index in range(3)]
DECODING = Decoding(num_generations=1, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=4)


def answer(prompt: Prompt, *more: Any) -> list[Candidate]:
    return [Candidate(prompt.id, 0, (1,), (0.0,), "text", "stop", 0, 0)]


def generators(desk: Desk, *handles: Handle, count: int = 1) -> SupervisedGenerators:
    left = iter(handles)
    return SupervisedGenerators(
        lambda slot: next(left),  # type: ignore[arg-type]
        block=GeneratorsBlock(count=count),
        recovery=desk.recovery,
        supervision=Supervision("generator", GeneratorError, desk.incidents(), Path()),
    )


def ready(pool: SupervisedGenerators) -> None:
    pool.wait_ready()
    pool.bring_newcomers_up_to_date(lambda handle: None)


def sample(pool: SupervisedGenerators) -> list[str]:
    found = pool.sample(PROMPTS, DECODING, seed=0, round_index=1, version=0, advance=lambda n: None)
    return [candidate.prompt_id for candidate in found]


def test_a_generator_that_the_monitor_ends_is_replaced_when_its_node_has_room(no_ray: list[float]) -> None:
    desk = Desk(Node(full=2))
    pool = generators(desk, Handle(sample=[OOM]), Handle(sample=answer))
    ready(pool)
    assert sample(pool) == ["p0", "p1", "p2"]
    assert desk.seen == [("lost", "memory"), ("recovered", "")]
    assert desk.node.looks == 3 and no_ray[0] >= 7, "1 s, then 2, then 4"


def test_the_other_generators_work_on_meanwhile() -> None:
    desk = Desk(Node(full=10**9), recovery=RecoveryBlock(memory_timeout_s=1e8))
    busy = Handle(sample=answer)
    pool = generators(desk, Handle(sample=[OOM]), busy, count=2)
    ready(pool)
    assert sample(pool) == ["p0", "p1", "p2"] and busy.asked.count("sample") == 3
    assert pool.call("asking", 1.0, Generator.version) == [None], "nor is a publish held up"
    assert desk.seen == [("lost", "memory")]


def test_the_last_generator_is_not_waited_for_without_end() -> None:
    desk = Desk(Node(full=10**9), recovery=RecoveryBlock(memory_timeout_s=600))
    pool = generators(desk, Handle(sample=[OOM]))
    ready(pool)
    with pytest.raises(GeneratorError, match=r"no room for a replacement within 600 s") as caught:
        sample(pool)
    assert "generators.kv_cache_gb" in caught.value.cure


def test_a_generator_that_is_ended_while_it_first_loads_is_replaced() -> None:
    desk = Desk()
    pool = generators(desk, Handle(ready=[OOM]), Handle(sample=answer))
    ready(pool)
    assert sample(pool) == ["p0", "p1", "p2"] and desk.seen == [("lost", "memory"), ("recovered", "")]


def test_an_engine_that_cannot_start_ends_the_run_with_its_own_words() -> None:
    desk = Desk()
    with pytest.raises(GeneratorError) as caught:
        ready(generators(desk, Handle(ready=[BROKEN])))
    assert str(caught.value).startswith("starting the generators: ValidationError: 1 validation error")
    assert caught.value.cure == "lower generators.max_model_len" and desk.seen == []


@dataclass
class Round:
    """What a round in training writes to."""

    folder: Path
    index: int = 1
    steps: list[int] = field(default_factory=list)

    def step(self, number: int, metrics: Metrics) -> None:
        self.steps.append(number)

    @contextmanager
    def new_checkpoint(self, steps: Sequence[Metrics], complete: bool, needed_bytes: int) -> Iterator[Path]:
        yield self.folder / "0001"

    def save_bad_step(self, number: int, preferences: Sequence[Any]) -> None:
        raise AssertionError(number)


def rank(**answers: Any) -> Handle:
    known = {"begin_round": 3, "train_step": {"loss": 1.0}, "state_bytes": 0, "save_state": [{"loss": 1.0}] * 3}
    return Handle(**{**known, "save_state": [[{"loss": 1.0}] * 3], **answers})


def trainers(desk: Desk, *groups: list[Handle]) -> SupervisedTrainers:
    left = iter(groups)

    def start() -> Sequence[Any]:
        return next(left)

    return SupervisedTrainers(
        start,
        block=TrainerBlock(),
        loss=SftLossBlock(),
        reference=NoReferenceBlock(),
        adapter=False,
        supervision=Supervision("trainer", TrainerError, desk.incidents(), Path()),
    )


def test_ranks_that_the_monitor_ends_go_on_when_their_node_has_room(no_ray: list[float], tmp_path: Path) -> None:
    desk = Desk(Node(full=1))
    group = trainers(desk, [rank(train_step=[{"loss": 1.0}, OOM])], [rank()])
    record = Round(tmp_path)
    assert len(group.train_round([], 0, record, lambda n: None)) == 3
    assert record.steps == [1, 1, 2, 3] and desk.seen == [("lost", "memory"), ("recovered", "")]
    assert no_ray[0] == 3, "1 s, then 2"


def test_ranks_that_outgrow_their_node_three_times_end_the_run(tmp_path: Path) -> None:
    desk = Desk()
    desk.node._at_start = {"0ffe48f1": MemoryUsage(3.05 * GB, 25 * GB, 0)}
    group = trainers(desk, *[[rank(train_step=[OOM])] for _ in range(3)])
    with pytest.raises(TrainerError, match="trainers outgrew the memory of its node 3 times") as caught:
        group.train_round([], 0, Round(tmp_path), lambda n: None)
    assert caught.value.cure.startswith("lower trainer.max_tokens_per_micro_batch")
    assert desk.seen == [("lost", "memory"), ("recovered", "")] * 2 + [("lost", "memory")]


def scorer(desk: Desk, *handles: Handle) -> ScorerClient:
    left = iter(handles)
    return ScorerClient(
        lambda: next(left),  # type: ignore[arg-type]
        FunctionScoringBlock(function="m:f", cache=None),
        Supervision("scorer", ScorerError, desk.incidents(), Path()),
        start_timeout_s=9.0,
    )


def test_a_lack_of_memory_says_nothing_against_a_batch() -> None:
    """Four scorers are ended with it, one more than may be; the fifth scores it."""
    desk = Desk()
    scored = ScoredBatch([Score(1.0)], {})
    client = scorer(desk, *[Handle(score=[OOM]) for _ in range(4)], Handle(score=[scored]))
    client.wait_ready()
    assert [score.value for score in client.score(PROMPTS, answer(PROMPTS[0]))] == [1.0]
    assert desk.seen == [("lost", "memory"), ("recovered", "")] * 4


def test_a_scorer_that_is_ended_while_it_first_loads_is_replaced() -> None:
    desk = Desk()
    client = scorer(desk, Handle(ready=[OOM]), Handle())
    client.wait_ready()
    assert desk.seen == [("lost", "memory"), ("recovered", "")]


def test_a_scorer_that_cannot_load_ends_the_run() -> None:
    desk = Desk()
    with pytest.raises(ScorerError, match="starting the scorer: ValidationError"):
        scorer(desk, Handle(ready=[BROKEN])).wait_ready()
    assert desk.seen == []


def test_one_that_is_idle_is_told_from_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = type("Cause", (), {"HasField": lambda self, name: name == "oom_context"})()
    cause.oom_context = type("Context", (), {"error_message": REPORT})()
    record = {"State": "DEAD", "DeathCause": cause}
    desk = Desk(Node(full=1))
    client = scorer(desk, Handle(), Handle())
    client.wait_ready()
    monkeypatch.setattr("ray._private.state.actors", lambda actor: record if not desk.seen else {})
    client.replace_dead()
    assert desk.seen == [("lost", "memory")]
    client.guard.sleep(1.0)
    client.replace_dead()
    assert desk.seen == [("lost", "memory")], "the node is full"
    client.guard.sleep(2.0)
    client.replace_dead()
    assert desk.seen == [("lost", "memory"), ("recovered", "")]
