"""What people said becomes scores of candidates; no MLflow is asked where every answer is there."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raylign.config import OnlineDpoConfig, parse_config
from raylign.config.scoring import HumanScoringBlock, WeightedScoringBlock, asks_people, leaves
from raylign.errors import RaylignError, Waiting
from raylign.records import Candidate, Prompt, Score
from raylign.review.record import Answer, Choice, Pair, ReviewRecord, Said, pair_of
from raylign.review.waiting import open_questions, require_answers, with_answers
from raylign.run.directory import RunDirectory, run_path
from raylign.scoring.base import ScoringItem
from raylign.scoring.composition import PEOPLE, composed
from raylign.scoring.kind import batches, longest_s
from raylign.tracking.journal import JOURNAL_NAME, Journal
from tests.scorers import table

PROMPT = Prompt("p1", ({"role": "user", "content": "Write."},), (1,), {"answer": "4"})
HUMAN = HumanScoringBlock()


@pytest.fixture
def asks(tmp_path: Path) -> OnlineDpoConfig:
    """A run whose MLflow would refuse every question: nothing listens at its port."""
    config = parse_config(
        {"scoring": {"type": "human"}, "run": {"dir": str(tmp_path), "name": "r", "seed": 3}},
        ["tracking.uri=http://127.0.0.1:9"],
    )
    with Journal(run_path(config.run) / JOURNAL_NAME) as journal:
        journal.append("campaign_started", {"campaign": "c1", "name": "r", "params": {}, "tags": {}})
    return config


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate("p1", index, (1,), (-1.0,), text, "stop", 0, 0) for index, text in enumerate(texts)]


def pair(first: str, second: str, seed: int = 3) -> Pair:
    return pair_of("c1", 1, (PROMPT.id, PROMPT.messages), (first, second), by="scoring", seed=seed)


def say(config: OnlineDpoConfig, *said: tuple[str, str, Sequence[Choice]], declined: Sequence[Pair] = ()) -> None:
    record = ReviewRecord(run_path(config.run))
    own = [(pair(first, second), choices) for first, second, choices in said]
    record.add([*(one for one, _ in own), *declined])
    answers = [
        Answer(one.id, f"person {number}", choice, "", number)
        for one, choices in own
        for number, choice in enumerate(choices)
    ]
    record.keep(Said(tuple(answers), tuple(one.id for one in declined)))


def shares(config: OnlineDpoConfig, *texts: str) -> Any:
    (prompt,) = with_answers(config, 1, [PROMPT], candidates(*texts))
    assert prompt.meta["answer"] == "4"
    return prompt.meta[PEOPLE]


def test_a_share_is_of_wins_against_every_other_candidate(asks: OnlineDpoConfig) -> None:
    say(asks, ("a", "b", ["first"]), ("a", "c", ["tie"]), ("b", "c", ["second", "first", "second", "second"]))
    assert shares(asks, "a", "b", "c") == {"a": 0.75, "b": 0.125, "c": pytest.approx(0.625)}


def test_a_candidate_of_the_same_text_is_a_tie_that_nobody_is_asked_about(asks: OnlineDpoConfig) -> None:
    say(asks, ("a", "b", ["first"]))
    assert shares(asks, "a", "a", "b") == {"a": 0.75, "b": 0.0}
    assert shares(asks, "a", "a") == {"a": 0.5}


def test_declined_pairs_do_not_hold_the_run(asks: OnlineDpoConfig) -> None:
    say(asks, ("a", "b", ["second"]), declined=[pair("a", "c"), pair("b", "c")])
    assert shares(asks, "a", "b", "c") == {"a": 0.0, "b": 1.0}


def test_open_questions_are_those_of_rounds_that_nobody_has_settled(asks: OnlineDpoConfig) -> None:
    assert open_questions(run_path(asks.run)) == 0
    say(asks, ("a", "b", ["first"]), ("a", "c", []), declined=[pair("b", "c")])
    chosen = pair_of("c1", 1, (PROMPT.id, PROMPT.messages), ("d", "e"), by="random", seed=0)
    ReviewRecord(run_path(asks.run)).add([chosen])
    assert open_questions(run_path(asks.run)) == 1


def test_an_answer_counts_whichever_stands_first(asks: OnlineDpoConfig) -> None:
    say(asks, ("a", "b", ["first"]))
    assert shares(asks, "b", "a") == {"a": 1.0, "b": 0.0}


def test_an_open_question_asks_mlflow_which_is_named_when_it_is_away(asks: OnlineDpoConfig) -> None:
    say(asks, ("a", "b", ["first"]))
    with pytest.raises(RaylignError, match=r"MLflow at http://127\.0\.0\.1:9, where people answer, fails"):
        shares(asks, "a", "b", "c")
    require_answers(asks)  # what was recorded is answered
    ReviewRecord(run_path(asks.run)).add([pair("a", "c")])
    with pytest.raises(RaylignError, match="where people answer, fails"):
        require_answers(asks)


class Queue:
    """MLflow's side: a pull finds `found`."""

    found = Said()
    sent = 0

    def __init__(self, config: OnlineDpoConfig) -> None:
        self._record = ReviewRecord(run_path(config.run))

    def send(self, pairs: Sequence[Pair]) -> None:
        self._record.add(pairs)
        type(self).sent += len(pairs)

    def pull(self) -> None:
        self._record.keep(self.found)

    def address(self) -> str:
        return "http://here"


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> type[Queue]:
    class Own(Queue):
        pass

    monkeypatch.setattr("raylign.review.run_review.RunReview", Own)
    return Own


def test_an_answer_that_was_corrected_since_it_was_read_counts_as_it_is(
    asks: OnlineDpoConfig, queue: type[Queue]
) -> None:
    say(asks, ("a", "b", ["first"]))
    queue.found = Said((Answer(pair("a", "b").id, "ann", "second", "", 9),))
    assert shares(asks, "a", "b") == {"a": 0.0, "b": 1.0}
    queue.found = Said()  # taken back in MLflow
    with pytest.raises(Waiting, match="1 of 1 questions have no answer yet; answer them at http://here"):
        shares(asks, "a", "b")
    assert queue.sent == 0


def test_answers_that_were_read_do_without_mlflow(asks: OnlineDpoConfig, caplog: pytest.LogCaptureFixture) -> None:
    say(asks, ("a", "b", ["first"]))
    assert shares(asks, "a", "b") == {"a": 1.0, "b": 0.0}
    assert "where people answer, fails" in caplog.text
    assert "the round is scored by the answers that were read before" in caplog.text


@pytest.mark.parametrize("ended", [True, False])
def test_a_start_that_was_killed_waits_in_mlflow_too(
    asks: OnlineDpoConfig, queue: type[Queue], monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    closed: list[str] = []

    class Tracked:
        def close(self, status: str) -> None:
            closed.append(status)

    monkeypatch.setattr("raylign.review.waiting.open_tracker", lambda run_dir, block: Tracked())
    ReviewRecord(run_path(asks.run)).add([pair("a", "b")])
    if ended:
        with Journal(run_path(asks.run) / JOURNAL_NAME) as journal:
            journal.append("campaign_finished", {"status": "SCHEDULED"})
    for _ in range(2):
        with pytest.raises(Waiting):
            require_answers(asks)
        with RunDirectory(run_path(asks.run)).locked(), pytest.raises(Waiting):
            require_answers(asks)
    assert closed == ([] if ended else ["SCHEDULED"] * 2)


def test_other_scorers_ask_nobody(asks: OnlineDpoConfig, tmp_path: Path) -> None:
    config = parse_config({"run": {"dir": str(tmp_path), "name": "other"}})
    assert with_answers(config, 1, [PROMPT], candidates("a", "b")) == [PROMPT]
    require_answers(config)
    assert not run_path(config.run).exists()


def items(meta: dict[str, Any], *texts: str) -> list[ScoringItem]:
    return [ScoringItem(replace(PROMPT, meta=meta), text) for text in texts]


def test_the_scorer_takes_shares_where_people_were_asked_and_the_other_scorer_elsewhere() -> None:
    held_out = table(a=7.0, b=None)
    scorer = composed(HUMAN, {"held_out": held_out})
    assert scorer.score(items({PEOPLE: {"a": 0.75}}, "a", "x"), 1) == [
        Score(0.75),
        Score(None, reason="people compared it with no other answer"),
    ]
    assert held_out.asked == []
    assert scorer.score(items({}, "a", "b")) == [Score(7.0), Score(None, reason="no idea")]
    assert held_out.asked == [["a", "b"]]


def test_people_are_a_member_like_any_other() -> None:
    block = WeightedScoringBlock(scorers={"people": HUMAN, "short": HUMAN.held_out}, weights={"people": 2, "short": -1})
    people = composed(HUMAN, {"held_out": table()})
    scorer = composed(block, {"people": people, "short": table(a=0.5)})
    assert scorer.score(items({PEOPLE: {"a": 0.75}}, "a")) == [Score(1.0, {"people": 0.75, "short": 0.5})]
    assert asks_people(block) and block.compares and not asks_people(HUMAN.held_out)


def test_a_recipe_names_it() -> None:
    config = parse_config({"scoring": {"type": "human", "held_out": {"type": "verifier"}}})
    assert [leaf.type for leaf in leaves(config.scoring)] == ["verifier"]
    assert json.loads(config.scoring.model_dump_json())["held_out"]["type"] == "verifier"
    group = items({PEOPLE: {}}, "a", "b")
    assert [len(batch) for batch in batches(group * 40, config.scoring)] == [80]
    assert longest_s(group, config.scoring) > 0
    with pytest.raises(RaylignError, match=r"evaluation\.num_generations=2"):
        parse_config({"scoring": {"type": "human"}, "evaluation": {"num_generations": 2}})
