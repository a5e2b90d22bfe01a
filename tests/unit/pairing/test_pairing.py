"""Best-worst pairing: extremes, ties, identity, margins, counts."""

from typing import get_args

import pytest

from raylign.config.pairing import BestWorstPairingBlock
from raylign.errors import NoPreferencesError
from raylign.pairing import PairingResult, build_preferences, group_by_prompt, require_preferences
from raylign.pairing.usable import Dropped
from raylign.records import Candidate, FinishReason, Prompt, Score

BLOCK = BestWorstPairingBlock()
ZERO = dict.fromkeys(("unscored", "truncated", *get_args(Dropped)), 0)


def prompt(name: str) -> Prompt:
    return Prompt(name, ({"role": "user", "content": name},), (1,))


def candidate(name: str, index: int, tokens: tuple[int, ...], finish: FinishReason = "stop") -> Candidate:
    return Candidate(name, index, tokens, (-1.0,) * len(tokens), f"text {tokens}", finish, 0, index)


def pair_up(tokens: list[tuple[int, ...]], values: list[float | None], min_margin: float = 0.0) -> PairingResult:
    """Pairing of one prompt."""
    candidates = [candidate("a", index, ids) for index, ids in enumerate(tokens)]
    scores = [Score(value, reason="" if value is not None else "late") for value in values]
    return build_preferences([prompt("a")], candidates, scores, BestWorstPairingBlock(min_margin=min_margin), seed=0)


def indices(result: PairingResult) -> tuple[int, ...]:
    (preference,) = result.preferences
    return tuple(c.index for c in preference.candidates)


def test_best_and_worst_of_each_prompt_in_prompt_order() -> None:
    prompts = [prompt("a"), prompt("b")]
    candidates = [candidate(name, index, (index + 1,)) for name in "ab" for index in range(3)]
    values = [0.2, 0.9, -0.4, 3.0, 1.0, 2.0]
    result = build_preferences(prompts, candidates, [Score(value) for value in values], BLOCK, seed=0)
    first, second = result.preferences
    assert (first.prompt, first.candidates, first.scores) == (prompts[0], (candidates[1], candidates[2]), (0.9, -0.4))
    assert (second.prompt, second.candidates, second.scores) == (prompts[1], (candidates[3], candidates[4]), (3.0, 1.0))
    assert first.weights == (1.0, 1.0) and first.reference_logps == ()
    assert result.counts == ZERO | {"prompts": 2, "candidates": 6, "preferences": 2}


def test_equal_extremes_go_to_the_lowest_index() -> None:
    assert indices(pair_up([(1,), (2,), (3,), (4,)], [0.0, 1.0, 1.0, 0.0])) == (1, 0)


def test_unscored_candidates_are_left_out_and_counted() -> None:
    result = pair_up([(1,), (2,), (3,)], [None, 1.0, 0.0])
    assert indices(result) == (1, 2)
    assert result.counts["unscored"] == 1 and result.counts["unscored_groups"] == 0


def test_one_scored_candidate_is_no_pair() -> None:
    result = pair_up([(1,), (2,)], [None, 1.0])
    assert result.preferences == () and result.counts["unscored_groups"] == 1


def test_identical_tokens_count_once_with_the_first_score() -> None:
    # Index 2 repeats index 0, so its top score is not eligible; best is index 1.
    result = pair_up([(1,), (2,), (1,)], [0.0, 0.5, 9.0])
    assert indices(result) == (1, 0)
    assert result.preferences[0].scores == (0.5, 0.0)


@pytest.mark.parametrize("tokens", [(7, 8), ()])
def test_one_distinct_candidate_is_identical_even_if_scored_differently(tokens: tuple[int, ...]) -> None:
    result = pair_up([tokens, tokens], [0.0, 1.0])
    assert result.preferences == () and result.counts["identical"] == 1


def test_ties_never_become_pairs() -> None:
    result = pair_up([(1,), (2,)], [0.5, 0.5])
    assert result.preferences == ()
    assert result.counts == ZERO | {"prompts": 1, "candidates": 2, "ties": 1, "preferences": 0}


@pytest.mark.parametrize(("min_margin", "kept"), [(0.5, 1), (0.51, 0)])
def test_the_margin_is_the_smallest_gap_kept(min_margin: float, kept: int) -> None:
    result = pair_up([(1,), (2,)], [0.75, 0.25], min_margin)
    assert len(result.preferences) == kept and result.counts["below_margin"] == 1 - kept


def test_truncated_candidates_are_counted_and_kept() -> None:
    candidates = [candidate("a", 0, (1,), "length"), candidate("a", 1, (2,))]
    result = build_preferences([prompt("a")], candidates, [Score(1.0), Score(0.0)], BLOCK, seed=0)
    assert result.counts["truncated"] == 1 and result.preferences[0].candidates[0].finish_reason == "length"


def test_a_prompt_without_candidates_is_an_unscored_group() -> None:
    result = build_preferences([prompt("a")], [], [], BLOCK, seed=0)
    assert result.counts == ZERO | {"prompts": 1, "candidates": 0, "unscored_groups": 1, "preferences": 0}


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        ("aab", [1.0, 2.0], "2 scores for 3 candidates"),
        ("aba", [1.0, 2.0, 3.0], "prompt 'a' are not adjacent"),
        ("aax", [1.0, 2.0, 3.0], "without a prompt, among them 'x'"),
        ("aab", [1.0, float("nan"), 3.0], "1 scores are not finite"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(names: str, values: list[float], message: str) -> None:
    candidates = [candidate(name, index, (index,)) for index, name in enumerate(names)]
    with pytest.raises(ValueError, match=message):
        group_by_prompt([prompt("a"), prompt("b")], candidates, [Score(value) for value in values])


def test_no_pair_at_all_says_why_and_what_helps() -> None:
    with pytest.raises(NoPreferencesError) as caught:
        require_preferences(pair_up([(1,), (2,)], [0.6, 0.5], min_margin=0.5), round_index=3)
    text = str(caught.value)
    assert "round 3 gave no pair from 2 candidates (0 unscored, 0 truncated) of 1 prompts" in text
    assert "1 had a score gap below pairing.min_margin: lower pairing.min_margin" in text
    assert "identical" not in text
    require_preferences(pair_up([(1,), (2,)], [0.6, 0.5]), round_index=3)
