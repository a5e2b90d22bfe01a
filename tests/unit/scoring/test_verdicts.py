"""A judge's verdicts are kept one by one: a group that has grown is judged anew, and only what is new is asked."""

import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raylign.config.scoring import JudgeScoringBlock
from raylign.scoring.load import LoadedScorer, load_scorer
from raylign.scoring.usage import summary
from tests.judges import Asked, Judged, Reply, Server, first_is_best, group, honest, values


def loaded(server: Server, folder: Path, **options: Any) -> LoadedScorer:
    settings = {"canaries": False, "max_unscored": 1.0, "retries": 0} | options
    block = JudgeScoringBlock(base_url=server.base_url, model="judge-1", **settings)
    return load_scorer(block, folder / "scores.sqlite")


def asked(server: Server) -> Counter[tuple[str, ...]]:
    """How often each comparison and rating was asked for; the question to meet the judge is none of them."""
    names = ({True: ("answer",), False: ("answer A", "answer B")}[one.is_rating] for one in server.asked)
    found = Counter(tuple(one.data(name) for name in own) for one, own in zip(server.asked, names, strict=True))
    return Counter({texts: count for texts, count in found.items() if not any("Paris" in text for text in texts)})


GROWN = ("good", "bad", "good good", "good good good")


def test_a_group_that_has_grown_is_judged_anew_with_new_questions_alone(judged: Judged, tmp_path: Path) -> None:
    _, server = judged(honest)
    assert values(loaded(server, tmp_path).score(group("good", "bad"))) == [1.0, 0.0]
    scorer = loaded(server, tmp_path)
    scores = scorer.score(group(*GROWN))
    assert values(scores) == pytest.approx([1 / 3, 0, 2 / 3, 1])
    assert scores[0].parts == {"comparisons": 3.0, "disagreements": 0.0, "missing": 0.0}
    assert asked(server) == {(one, other): 1 for one in GROWN for other in GROWN if one != other}
    metrics = summary(scorer.take_usage())
    assert (metrics["judge/items"], metrics["judge/cache_hits"]) == (4, 0)
    # The judge is met, then asked about five new pairs in both orders.
    assert (metrics["judge/requests"], metrics["judge/comparisons"]) == (11, 5)


def test_a_group_of_known_pairs_is_not_asked_about(judged: Judged, tmp_path: Path) -> None:
    _, server = judged(honest)
    loaded(server, tmp_path).score([*group(*GROWN), *group("good good", prompt="p1")])
    before = len(server.asked)
    scorer = loaded(server, tmp_path)
    items = [*group("good good", "bad", "good"), *group("good good", prompt="p1")]
    assert values(scorer.score(items)) == [1.0, 0.0, 0.5, 2 / 9]
    metrics = summary(scorer.take_usage())
    assert len(server.asked) == before and (metrics["judge/calls"], metrics["judge/cache_hits"]) == (0, 4)


def test_both_orders_are_kept(judged: Judged, tmp_path: Path) -> None:
    """A judge who prefers a position goes on to decide nothing, and is told so."""
    _, server = judged(first_is_best)
    for _ in range(2):
        scores = loaded(server, tmp_path).score(group("a", "b", "c"))
        assert values(scores) == [0.5] * 3 and [score.parts["disagreements"] for score in scores] == [2.0] * 3
    assert set(asked(server).values()) == {1}


def test_a_rating_and_a_comparison_are_different_questions(judged: Judged, tmp_path: Path) -> None:
    _, server = judged(honest)
    scorer = loaded(server, tmp_path)
    assert values(scorer.score(group("good", "bad"))) == [1.0, 0.0]
    assert values(scorer.score(group("good"))) == [1 / 9]
    assert values(scorer.score(group("good", "bad"))) == [1.0, 0.0]


def test_other_prompts_and_other_judges_are_asked_themselves(judged: Judged, tmp_path: Path) -> None:
    _, server = judged(honest)
    scorer = loaded(server, tmp_path)
    scorer.score([*group("good", "bad"), *group("good", "bad", prompt="p1")])
    loaded(server, tmp_path, criterion="The shorter answer is better.").score(group("good", "bad"))
    assert asked(server) == {("good", "bad"): 3, ("bad", "good"): 3}


def test_what_was_answered_before_a_judge_fell_silent_is_not_asked_again(judged: Judged, tmp_path: Path) -> None:
    """As where a run is killed in the middle of a group: half of the answers are there."""
    lock, left = threading.Lock(), [7]

    def failing(one: Asked) -> Reply:
        with lock:
            left[0] -= 1
            return Reply(status=400, raw="gone") if left[0] < 0 else honest(one)

    _, server = judged(failing)
    first = loaded(server, tmp_path, concurrency=1).score(group(*GROWN))
    assert any(score.parts.get("missing") or score.value is None for score in first)
    left[0] = 1000
    before = asked(server)
    assert values(loaded(server, tmp_path).score(group(*GROWN))) == pytest.approx([1 / 3, 0, 2 / 3, 1])
    again = asked(server) - before
    # 12 questions; one of the 7 answers met the judge.
    assert again.total() == 12 - 6 and set(again.values()) == {1}


def test_without_a_cache_everything_is_asked_again(judged: Judged, tmp_path: Path) -> None:
    _, server = judged(honest)
    scorer = loaded(server, tmp_path, cache=None)
    for _ in range(2):
        assert values(scorer.score(group("good", "bad"))) == [1.0, 0.0]
    assert asked(server) == {("good", "bad"): 2, ("bad", "good"): 2}
    assert not (tmp_path / "scores.sqlite").exists()


def test_the_file_holds_no_text(judged: Judged, tmp_path: Path) -> None:
    _, server = judged(honest)
    loaded(server, tmp_path).score(group("good secret", "bad"))
    assert not re.search(b"secret", (tmp_path / "scores.sqlite").read_bytes())
