"""From rated answers to pairs, in numbers worked out by hand."""

from collections.abc import Mapping

import pytest

from raylign.config.prepare import NamesBlock, RatingsBlock, WeightsBlock
from raylign.data.examples import Completion, Example
from raylign.data.formats import SCALES
from raylign.data.prepare.ratings import RATINGS, Pair, Rater
from raylign.errors import DataError

ULTRAFEEDBACK, HELPSTEER = SCALES["ultrafeedback"], SCALES["helpsteer2"]


def answer(text: str, score: float | None = None, **ratings: float) -> Completion:
    return Completion(({"role": "assistant", "content": text},), score, ratings)


def example(*completions: Completion, ranked: bool = False) -> Example:
    return Example(1, ({"role": "user", "content": "Why?"},), completions, ranked)


def pairs(
    given: Example, scales: Mapping[str, tuple[float, float]] = ULTRAFEEDBACK, **options: object
) -> list[tuple[object, object]]:
    """(chosen text, rejected text) of each pair."""
    made = Rater(RatingsBlock.model_validate(options), scales).pairs(given)
    assert not isinstance(made, str), made
    return [(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in made]


def score(scales: Mapping[str, tuple[float, float]], block: RatingsBlock | None = None, **ratings: float) -> float:
    scores = Rater(block or RatingsBlock(), scales).scores([answer("text", **ratings)])
    assert scores is not None
    return scores[0]


def test_all_five_attributes_are_weighted_on_their_scale() -> None:
    # .4 * 4/4 + .3 * 3/4 + .2 * 2/4 + .05 * 1/4 + .05 * 0/4
    found = score(HELPSTEER, correctness=4, helpfulness=3, coherence=2, complexity=1, verbosity=0)
    assert found == pytest.approx(0.4 + 0.225 + 0.1 + 0.0125)


def test_names_that_stand_for_one_attribute_are_averaged_and_missing_weights_shared_out() -> None:
    # correctness (3/4 + 1/4) / 2 = .5, coherence 1, helpfulness 0; weights .4, .2, .3 of .9
    found = score(ULTRAFEEDBACK, honesty=4, truthfulness=2, instruction_following=5, helpfulness=1)
    assert found == pytest.approx((0.4 * 0.5 + 0.2 * 1 + 0.3 * 0) / 0.9)


def test_an_attribute_can_be_renamed_left_out_or_weigh_nothing() -> None:
    named = RatingsBlock(names=NamesBlock(honesty="helpfulness", truthfulness=None))
    assert score(ULTRAFEEDBACK, named, honesty=3, truthfulness=5) == pytest.approx(0.5)
    weightless = RatingsBlock(weights=WeightsBlock(helpfulness=0.0))
    assert score(ULTRAFEEDBACK, weightless, honesty=2, helpfulness=5) == pytest.approx(0.25)


def test_best_against_worst_and_all_pairs() -> None:
    given = example(answer("mid", helpfulness=3), answer("best", helpfulness=5), answer("low", helpfulness=1))
    assert pairs(given) == [("best", "low")]
    assert pairs(given, pairs="all_pairs") == [("best", "mid"), ("best", "low"), ("mid", "low")]
    # mid against the others differs by 1/2.
    assert pairs(given, pairs="all_pairs", min_gap=0.6) == [("best", "low")]


def test_a_gap_of_exactly_the_minimum_is_enough_and_a_smaller_one_is_not() -> None:
    given = example(answer("a", helpfulness=5), answer("b", helpfulness=4))
    assert pairs(given, min_gap=0.25) == [("a", "b")]
    assert Rater(RatingsBlock(min_gap=0.26), ULTRAFEEDBACK).pairs(given) == "small_gap"


def test_equal_ratings_never_make_a_pair() -> None:
    given = example(answer("a", helpfulness=5), answer("b", helpfulness=5))
    assert Rater(RatingsBlock(min_gap=0.0), ULTRAFEEDBACK).pairs(given) == "small_gap"


def test_only_attributes_of_all_answers_are_compared() -> None:
    # By its own ratings b would have 1 and a (0.4 * 1 + 0.3 * 0.5) / 0.7; by helpfulness alone b is better too, by 1/2.
    given = example(answer("a", honesty=5, helpfulness=3), answer("b", helpfulness=5), answer("unrated"))
    made = Rater(RatingsBlock(), ULTRAFEEDBACK).pairs(given)
    assert made == (Pair(given.completions[1].messages, given.completions[0].messages, 1.0, 0.5, RATINGS),)


def test_scores_serve_where_there_are_no_ratings_and_need_no_gap() -> None:
    assert pairs(example(answer("a", 7.0), answer("b", 7.01))) == [("b", "a")]
    assert Rater(RatingsBlock(), {}).pairs(example(answer("a", 7.0), answer("b", 7.0))) == "tie"
    assert Rater(RatingsBlock(), {}).pairs(example(answer("a", 7.0), answer("b"))) == "unrated"


def test_a_ranking_keeps_its_order_with_and_without_scores() -> None:
    assert pairs(example(answer("a"), answer("b"), answer("c"), ranked=True)) == [("a", "c")]
    scored = example(answer("a", 3.0), answer("b", 3.0), answer("c", 1.0), ranked=True)
    assert pairs(scored, pairs="all_pairs") == [("a", "c"), ("b", "c")]


def test_a_pair_whose_ratings_say_the_opposite_is_none() -> None:
    given = example(answer("a", helpfulness=2), answer("b", helpfulness=4), ranked=True)
    assert Rater(RatingsBlock(), ULTRAFEEDBACK).pairs(given) == "small_gap"


def test_one_answer_alone_is_no_pair() -> None:
    assert Rater(RatingsBlock(), {}).pairs(example(answer("a"), ranked=True)) == "single_answer"


def test_ratings_without_a_scale_are_refused() -> None:
    given = example(answer("a", helpfulness=2), answer("b", helpfulness=4))
    with pytest.raises(DataError, match=r"'helpfulness' have no known scale; set the source's format"):
        Rater(RatingsBlock(), {}).pairs(given)
