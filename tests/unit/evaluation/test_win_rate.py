"""Win rates by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from raylign.errors import ScorerError
from raylign.evaluation.intervals import share_interval
from raylign.evaluation.win_rate import (
    Pair,
    against_versions,
    by_category,
    judged_pairs,
    scored_pairs,
    to_compare,
    win_rate,
)
from raylign.records import Candidate, Prompt, Score

NOTHING = Score(None, reason="late")


def prompt(name: str, **meta: object) -> Prompt:
    return Prompt(name, ({"role": "user", "content": "?"},), (1,), meta)


def answer(name: str, index: int = 0, text: str = "") -> Candidate:
    return Candidate(name, index, (1,), (0.0,), text, "stop", 0, 0)


def scored(*values: float | None) -> list[Score]:
    return [NOTHING if value is None else Score(value) for value in values]


def pairs(*shares: float, longer: Sequence[int] = ()) -> list[Pair]:
    """Of one prompt each."""
    return [Pair(f"{i:03d}", share, longer[i] if longer else 0) for i, share in enumerate(shares)]


def test_each_answer_meets_each_of_its_prompt() -> None:
    own = [answer("a", 0, "four"), answer("a", 1, "sixsix"), answer("b"), answer("c"), answer("d")]
    other = [answer("b"), answer("a", 0, "one"), answer("a", 1, ""), answer("c")]
    found = scored_pairs(own, scored(1.0, 0.5, 0.2, None, 9.0), other, scored(0.7, 0.5, 0.8, 0.0))
    # c has no score of its own, and nobody else answers d
    assert found == [Pair("a", 1.0, 1), Pair("a", 1.0, 4), Pair("a", 0.5, 3), Pair("a", 0.0, 6), Pair("b", 0.0, 0)]


def test_prompts_weigh_the_same_however_many_pairs_they_have() -> None:
    found = win_rate([*pairs(1.0, 0.0, 0.5), Pair("000", 0.0, 0), Pair("000", 0.5, 0)], 0.95, asked=5)
    assert found.rate == pytest.approx((0.5 + 0.0 + 0.5) / 3)
    assert (found.wins, found.ties, found.losses) == pytest.approx((1 / 9, 4 / 9, 4 / 9))
    assert (found.prompts, found.missing) == (3, 2)
    low, high = share_interval(np.array([0.5, 0.0, 0.5]), 0.95)
    assert (found.low, found.high) == (float(low), float(high))


def test_pairs_of_a_prompt_need_not_stand_together() -> None:
    one, two, three = Pair("a", 1.0, 0), Pair("b", 0.0, 0), Pair("a", 0.0, 0)
    assert win_rate([one, two, three], 0.95).rate == 0.25


def test_without_a_pair_there_is_no_rate() -> None:
    with pytest.raises(ScorerError, match="no pair of answers to compare on 3 prompts"):
        win_rate([], 0.95, asked=3)


def test_a_judge_sees_two_answers_at_a_time() -> None:
    """Each pair is a prompt of its own with the same words, so that no answer meets another of its own side."""
    asked, shown = to_compare(
        [prompt("a", k=1), prompt("b")], [answer("a", 0, "x"), answer("a", 1, "yy")], [answer("a", 0, "z")]
    )
    assert [(p.id, p.messages, p.meta) for p in asked] == [
        ("a/0/0", prompt("a").messages, {"k": 1}),
        ("a/1/0", prompt("a").messages, {"k": 1}),
    ]
    assert [(c.prompt_id, c.index, c.text) for c in shown] == [
        ("a/0/0", 0, "x"),
        ("a/0/0", 1, "z"),
        ("a/1/0", 0, "yy"),
        ("a/1/0", 1, "z"),
    ]
    # a win, and two orders that disagree
    assert judged_pairs(shown, scored(1.0, 0.0, 0.5, 0.5)) == [Pair("a", 1.0, 0), Pair("a", 0.5, 1)]
    assert judged_pairs(shown, scored(None, None, 0.0, 1.0)) == [Pair("a", 0.0, 1)]


def test_ids_with_slashes_stay_whole() -> None:
    _, shown = to_compare([prompt("a/1/2")], [answer("a/1/2")], [answer("a/1/2")])
    assert [pair.prompt_id for pair in judged_pairs(shown, scored(1.0, 0.0))] == ["a/1/2"]


def test_categories_are_those_of_the_rows() -> None:
    prompts = [
        prompt("000", kind="math"),
        prompt("001", kind="code"),
        prompt("002", kind="math"),
        prompt("003"),
        prompt("004", kind="art"),
    ]
    found = by_category(pairs(1.0, 0.0, 0.5, 1.0), prompts, "kind", 0.95)
    assert {name: (one.rate, one.prompts) for name, one in found.items()} == {
        "math": (0.75, 2),
        "code": (0.0, 1),
        "-": (1.0, 1),
    }
    assert next(iter(found)) == "math"


def test_fields_of_an_evaluation() -> None:
    own, scores = [answer("a", 0, "long answer"), answer("b")], scored(1.0, 0.0)
    first = ([answer("a"), answer("b")], scored(0.0, 0.0))
    found = against_versions(own, scores, {"initial": first, "previous_round": (own, scores)}, 0.95)
    assert found["win_rate"] == 0.75 and found["win_rate_previous"] == 0.5
    assert found["win_rate_low"] < 0.75 < found["win_rate_high"]
    assert found["win_rate_length_controlled_low"] < found["win_rate_length_controlled"] < 0.75
    assert against_versions(own, scores, {"initial": None, "previous_round": (own, scored(None, None))}, 0.95) == {}
