"""What the driver asks of its scorer actor, and how long it waits for each answer."""

from pathlib import Path
from typing import Any

import pytest

from actors.scorer import client as scorer_client
from actors.scorer.client import ScorerClient
from raylign.config.scoring import FunctionScoringBlock
from raylign.errors import ScorerError
from raylign.records import Candidate, Prompt, Score
from raylign.roles import ScoredBatch
from tests.fakes import quiet_supervision

START_S, RESTARTS_S, TIMEOUT_S = 300.0, 5.0, 1.0


class _Call:
    """Answers a call with the name of what was asked."""

    def __init__(self, name: str) -> None:
        self._name = name

    def remote(self, *arguments: object) -> str:
        return self._name


class _Actor:
    ready, score, gold = _Call("ready"), _Call("score"), _Call("gold")


def test_the_time_of_a_batch_begins_once_the_actor_has_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A slow start is no loss: it has the deadline of starts, and the first batch its own."""
    waits: list[tuple[str, float]] = []

    def answer(asked: str, timeout_s: float) -> Any:
        waits.append((asked, timeout_s))
        return ScoredBatch([Score(1.0)], {})

    monkeypatch.setattr(scorer_client, "_result", answer)
    block = FunctionScoringBlock(batch_size=1, timeout_s=TIMEOUT_S)
    actor: Any = _Actor()
    client = ScorerClient(
        lambda: actor,
        block,
        quiet_supervision("scorer", ScorerError, tmp_path),
        start_timeout_s=START_S,
        restarts_s=RESTARTS_S,
    )
    candidates = [Candidate("p", index, (1,), (0.0,), "text", "stop", 0, 0) for index in range(2)]
    client.score([Prompt("p", (), (1,))], candidates)
    batch = ("score", RESTARTS_S + 2 * TIMEOUT_S)
    assert waits == [("ready", START_S), batch, batch]


def test_the_gold_scorer_is_asked_by_its_own_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its batches, its deadlines, its limit of unscored ones; without one nobody is asked."""
    waits: list[tuple[str, float]] = []

    def answer(asked: str, timeout_s: float) -> Any:
        waits.append((asked, timeout_s))
        return ScoredBatch([Score(None, reason="late")], {})

    monkeypatch.setattr(scorer_client, "_result", answer)
    actor: Any = _Actor()
    gold = FunctionScoringBlock(batch_size=1, timeout_s=10 * TIMEOUT_S, max_unscored=0.5)

    def client(block: FunctionScoringBlock | None) -> ScorerClient:
        supervision = quiet_supervision("scorer", ScorerError, tmp_path)
        return ScorerClient(
            lambda: actor,
            FunctionScoringBlock(timeout_s=TIMEOUT_S),
            supervision,
            start_timeout_s=START_S,
            restarts_s=RESTARTS_S,
            gold=block,
        )

    candidates = [Candidate("p", index, (1,), (0.0,), "text", "stop", 0, 0) for index in range(4)]
    assert client(None).gold([Prompt("p", (), (1,))], candidates) == [] == waits
    found = client(gold).gold([Prompt("p", (), (1,))], candidates)
    batch = ("gold", RESTARTS_S + 20 * TIMEOUT_S)
    assert waits == [("ready", START_S), batch, batch, batch], "two of four may be unscored, the third is one too many"
    assert [score.reason.split(":")[0] for score in found] == ["late", "late", "late", "skipped"]
