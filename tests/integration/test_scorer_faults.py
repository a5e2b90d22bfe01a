"""Scorer actors that die, hang or refuse, on real Ray."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle

from actors.scorer import client as scorer_client
from actors.scorer.client import ACTOR, TRIES, ScorerActor, ScorerClient
from actors.supervision.incidents import Happened, Incidents
from actors.supervision.processes import kill
from actors.supervision.slot import Supervision
from raylign.config.blocks import RecoveryBlock
from raylign.config.scoring import FunctionScoringBlock
from raylign.errors import ScorerError
from raylign.records import Candidate, Prompt, Score
from raylign.scoring.base import check_unscored
from tests import faults
from tests.integration.tiny import wait_until
from tests.processes import alive

WAIT_S = 1200.0
RESTARTS_S = 60.0
LATE_S = 0.1


@dataclass
class Desk:
    """A scorer client with what it put on record, and the folder that its function writes to.

    Its first actor is one of `idle`, if there is any.
    """

    folder: Path
    stacks: Path
    idle: list[ActorHandle[Any]]
    block: FunctionScoringBlock
    recovery: RecoveryBlock = field(default_factory=RecoveryBlock)
    seen: list[tuple[Happened, float, Mapping[str, Any]]] = field(default_factory=list)
    advanced: list[int] = field(default_factory=list)
    actors: list[ActorHandle[Any]] = field(default_factory=list)

    def client(self, actor: Any = ScorerActor) -> ScorerClient:
        def spawn() -> ActorHandle[Any]:
            if actor is ScorerActor and self.idle:
                self.actors.append(self.idle.pop())
            else:
                self.actors.append(
                    actor.remote(self.block, str(self.folder / "scores.sqlite"), str(self.stacks), ACTOR)
                )
            return self.actors[-1]

        def note(role: str, happened: Happened, detail: Mapping[str, Any]) -> None:
            assert role == "scorer"
            self.seen.append((happened, time.monotonic(), detail))

        incidents = Incidents(self.recovery, note)
        return ScorerClient(
            spawn,
            self.block,
            Supervision("scorer", ScorerError, incidents, self.stacks),
            start_timeout_s=WAIT_S,
            restarts_s=RESTARTS_S,
        )

    def score(self, client: ScorerClient, *texts: str) -> list[Score]:
        prompt = Prompt("p", ({"role": "user", "content": str(self.folder)},), (1,))
        candidates = [Candidate("p", i, (1,), (0.0,), text, "stop", 0, 0) for i, text in enumerate(texts)]
        return client.score([prompt], candidates, self.advanced.append)

    def asked(self) -> list[dict[str, Any]]:
        path = self.folder / "asked.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def happened(self) -> list[str]:
        return [happened for happened, _, _ in self.seen]


Open = Callable[..., Desk]


@pytest.fixture(scope="module")
def idle(resources: Mapping[str, float]) -> Iterator[list[ActorHandle[Any]]]:
    """Scorer actors that a test has left behind for the next one; what they are asked says where they write."""
    actors: list[ActorHandle[Any]] = []
    yield actors
    kill(actors)


@pytest.fixture
def open_desk(tmp_path: Path, idle: list[ActorHandle[Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    desks: list[Desk] = []

    def make(max_unscored: float = 0.2, max_restarts: int = 20) -> Desk:
        block = FunctionScoringBlock(
            function="tests.integration.watched_scores:length",
            batch_size=2,
            timeout_s=60.0,
            max_unscored=max_unscored,
            cache=None,
        )
        stacks = tmp_path_factory.getbasetemp() / "stacks"
        desks.append(Desk(tmp_path, stacks, idle, block, RecoveryBlock(max_restarts=max_restarts)))
        return desks[-1]

    yield make
    for desk in desks:
        whole = [] if desk.happened()[-1:] == ["lost"] else desk.actors[-1:]
        kill([actor for actor in desk.actors if actor not in whole])
        idle += whole


def hit_while_waiting(
    desk: Desk, number: signal.Signals, hit: Callable[[], None] = lambda: None
) -> tuple[list[Score], float, int]:
    """Scores of five batches whose third waits until its actor got the signal; when that was, and the actor's pid.

    `hit` is called once it got it.
    """
    with ThreadPoolExecutor(1) as pool:
        scores = pool.submit(desk.score, desk.client(), "a", "bb", "ccc", "d", "wait", "ee", "f", "gg", "h", "ii")
        try:
            wait_until(lambda: len(desk.asked()) == 3 or scores.done(), WAIT_S, lambda: f"asked {desk.asked()}")
            actor: int = desk.asked()[2]["actor"]
            os.kill(actor, number)
            at = time.monotonic()
        finally:
            (desk.folder / "go").touch()
        hit()
        return scores.result(timeout=WAIT_S), at, actor


def assert_only_the_third_batch_was_asked_again(desk: Desk, scores: list[Score]) -> None:
    assert [score.value for score in scores] == [1, 2, 3, 1, 4, 2, 1, 2, 1, 2]
    batches = [["a", "bb"], ["ccc", "d"], ["wait", "ee"], ["wait", "ee"], ["f", "gg"], ["h", "ii"]]
    assert [call["completions"] for call in desk.asked()] == batches
    first, second = {call["actor"] for call in desk.asked()[:3]}, {call["actor"] for call in desk.asked()[3:]}
    assert len(first) == len(second) == 1 and first != second
    assert desk.advanced == [2] * 5
    assert desk.happened() == ["lost", "recovered"]
    assert [detail["actor"] for _, _, detail in desk.seen] == ["scorer-0"] * 2


@pytest.mark.fault
def test_a_killed_scorer_is_replaced_and_asked_for_the_rest(open_desk: Open) -> None:
    desk = open_desk()
    scores, killed, _ = hit_while_waiting(desk, signal.SIGKILL)
    assert_only_the_third_batch_was_asked_again(desk, scores)
    (_, lost, detail), (_, recovered, _) = desk.seen
    assert "died" in detail["cause"]
    faults.record(
        "scorer actor killed in the score stage",
        "kill -9 while it scores the third of five batches",
        detected_s=lost - killed,
        recovered_s=recovered - killed,
        lost="nothing; one batch scored twice",
    )


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[float]]:
    """When the event is set, the call that is out has LATE_S left; its own deadline goes to the list."""
    stopped, deadlines, result = threading.Event(), list[float](), scorer_client._result

    def late_once_stopped(ref: Any, timeout_s: float) -> Any:
        while not ray.wait([ref], timeout=LATE_S)[0]:
            if stopped.is_set():
                stopped.clear()
                deadlines.append(timeout_s)
                return result(ref, LATE_S)
        return result(ref, timeout_s)

    monkeypatch.setattr(scorer_client, "_result", late_once_stopped)
    return stopped, deadlines


@pytest.mark.fault
def test_a_hung_scorer_is_replaced_at_its_deadline(open_desk: Open, stop: tuple[threading.Event, list[float]]) -> None:
    desk, (now_stopped, deadlines) = open_desk(), stop
    scores, stopped, actor = hit_while_waiting(desk, signal.SIGSTOP, now_stopped.set)
    assert_only_the_third_batch_was_asked_again(desk, scores)
    (_, lost, detail), (_, recovered, _) = desk.seen
    assert deadlines == [RESTARTS_S + 2 * 2 * desk.block.timeout_s]
    assert detail["cause"].startswith(f"no answer within {LATE_S} s; process {actor} writes no stacks: it is stopped")
    wait_until(lambda: not alive(actor), WAIT_S, lambda: f"the stopped actor {actor} is still there")
    faults.record(
        "scorer actor hangs",
        f"SIGSTOP while it scores the third of five batches, which then has {LATE_S} s left",
        detected_s=lost - stopped,
        recovered_s=recovered - stopped,
        lost="nothing; one batch scored twice",
    )


@pytest.mark.fault
def test_a_batch_that_ends_every_actor_stays_unscored(open_desk: Open) -> None:
    desk = open_desk(max_unscored=0.5)
    started = time.monotonic()
    scores = desk.score(desk.client(), "a", "bb", "fatal", "d", "ee", "f")
    assert [score.value for score in scores] == [1, 2, None, None, 2, 1]
    assert {score.reason for score in scores[2:4]} == {scores[2].reason}
    assert scores[2].reason.startswith(f"{TRIES} scorer actors in turn were lost with this batch: ")
    assert desk.happened() == ["lost", "recovered"] * TRIES
    check_unscored(scores, desk.block.max_unscored)
    faults.record(
        "every scorer actor dies with the same batch",
        "a scoring function that kills its actor",
        recovered_s=desk.seen[-1][1] - started,
        lost="the batch stays unscored, with the reason",
    )


@pytest.mark.fault
def test_past_the_cap_of_restarts_a_lost_scorer_ends_the_run(open_desk: Open) -> None:
    desk = open_desk(max_restarts=1)
    with pytest.raises(ScorerError, match=r"scorer-0 is lost .*died.*, loss number 2 .*recovery.max_restarts=1"):
        desk.score(desk.client(), "a", "bb", "fatal", "d")
    assert desk.happened() == ["lost", "recovered", "lost"]
    faults.record(
        "scorer actors die more often than recovery.max_restarts",
        "a scoring function that kills its actor",
        lost="the run ends with the cause; what is finished is saved",
    )


def test_what_the_scorer_itself_refuses_is_no_loss(open_desk: Open) -> None:
    class Refusing:
        """Loads once; a new process of its function cannot be started any more."""

        def __init__(self, block: FunctionScoringBlock, cache: str, stacks: str, name: str) -> None: ...

        def ready(self) -> bool:
            return True

        def score(self, items: object, allowed: int) -> list[Score]:
            raise ScorerError("scoring.function=m:f cannot be loaded: no weights")

    desk = open_desk()
    with pytest.raises(ScorerError, match="scoring: scoring.function=m:f cannot be loaded: no weights"):
        desk.score(desk.client(ray.remote(Refusing)), "a", "bb")
    assert desk.seen == []
    kill([desk.actors.pop()])


def test_the_limit_of_unscored_items_is_that_of_the_whole_call(open_desk: Open) -> None:
    desk = open_desk(max_unscored=0.3)
    client = desk.client()
    scores = desk.score(client, "none", "none", "a", "bb", "none", "c", "d", "e", "f", "g")
    assert [score.value for score in scores] == [None, None, 1, 2, None, 1, 1, 1, 1, 1]
    taken = client.metrics()
    assert (taken["function/calls"], taken["function/items"], taken["function/failures"]) == (5, 10, 3)
    assert taken["function/failures_scorer_returned_none"] == 3 and taken["function/latency_mean_s"] > 0
    assert sum(len(call["completions"]) for call in desk.asked()) == 10


def test_nothing_is_asked_once_too_many_are_unscored(open_desk: Open) -> None:
    desk = open_desk(max_unscored=0.2)
    scores = desk.score(desk.client(), "none", "none", "none", "a", "b", "c", "d", "e", "f", "g")
    assert [score.value for score in scores] == [None, None, None, 1] + [None] * 6
    assert scores[-1].reason == "skipped: more than 20% of items already unscored"
    assert [call["completions"] for call in desk.asked()] == [["none", "none"], ["none", "a"]]
    assert sum(desk.advanced) == 10
