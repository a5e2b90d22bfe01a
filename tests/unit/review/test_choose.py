"""Which pairs are chosen, by hand."""

from collections.abc import Mapping, Sequence

import pytest

from raylign.config import parse_config
from raylign.config.scoring import FunctionScoringBlock, HumanScoringBlock, ScoringBlock, WeightedScoringBlock
from raylign.errors import RaylignError
from raylign.review.choose import By, Scored, choose, directions, disagreement, spreads
from raylign.review.run_review import new_pairs

ANY = FunctionScoringBlock()
TWO = WeightedScoringBlock(scorers={"good": ANY, "short": ANY}, weights={"good": 1.0, "short": 1.0})


def answer(prompt: str, text: str, values: Mapping[str, float], index: int = 1) -> Scored:
    return Scored(index, prompt, [{"role": "user", "content": prompt}], text, values)


def texts(answers: Sequence[Scored], by: By, block: ScoringBlock = ANY, seed: int = 0) -> list[tuple[str, str, str]]:
    return [(own.prompt_id, own.first, own.second) for own in choose(answers, by, block, "run", seed)]


SCORED = [
    *(answer("p", text, {"score": value}) for text, value in (("a", 0.0), ("b", 0.1), ("c", 1.0))),
    *(answer("q", text, {"score": value}) for text, value in (("a", 0.0), ("b", 0.5))),
]


def test_uncertain_pairs_come_first_one_of_each_prompt_before_a_second() -> None:
    assert texts(SCORED, "uncertainty") == [("p", "a", "b"), ("q", "a", "b"), ("p", "b", "c"), ("p", "a", "c")]


def test_random_pairs_are_all_pairs_in_an_order_of_the_seed() -> None:
    once = texts(SCORED, "random", seed=3)
    assert once == texts(SCORED, "random", seed=3)
    assert sorted(once) == sorted(texts(SCORED, "uncertainty"))
    assert len({tuple(texts(SCORED, "random", seed=seed)) for seed in range(20)}) > 1


def test_answers_of_the_same_text_or_another_round_are_no_pair() -> None:
    same = [answer("p", "a", {"score": 1.0}), answer("p", "a", {"score": 2.0}), answer("p", "b", {"score": 2.0}, 2)]
    with pytest.raises(RaylignError, match="two different scored answers"):
        texts(same, "random")


def test_unscored_answers_are_drawn_but_have_no_margin() -> None:
    half = [answer("p", "a", {}), answer("p", "b", {"score": 1.0})]
    assert len(texts(half, "random")) == 1
    with pytest.raises(RaylignError, match="--by random"):
        texts(half, "uncertainty")


def test_people_leave_nobody_to_be_uncertain_and_the_cure_helps() -> None:
    theirs = [answer("p", "a", {}), answer("p", "b", {})]
    for by in ("uncertainty", "disagreement"):
        with pytest.raises(RaylignError, match="take --by random"):
            texts(theirs, by, HumanScoringBlock())
    assert len(texts(theirs, "random", HumanScoringBlock())) == 1


def opposed(prompt: str, good: float, short: float) -> tuple[Scored, Scored]:
    return answer(prompt, "a", {"good": 0.0, "short": 0.0}), answer(prompt, "b", {"good": good, "short": short})


def test_disagreement_is_that_of_the_less_sure_of_two_opposed_scorers() -> None:
    first, second = opposed("p", 3.0, -10.0)
    assert disagreement(first, second, {"good": 1.0, "short": 5.0}) == 2.0
    assert disagreement(second, first, {"good": 1.0, "short": 5.0}) == 2.0
    assert disagreement(first, second, {}) == 0.0
    first, second = opposed("p", 3.0, 10.0)
    assert disagreement(first, second, {"good": 1.0, "short": 5.0}) == 0.0


def test_the_clearest_contradictions_come_first_and_agreement_is_left_out() -> None:
    answers = [*opposed("agree", 1.0, 1.0), *opposed("some", 1.0, -10.0), *opposed("much", 2.0, -30.0)]
    assert [prompt for prompt, _, _ in texts(answers, "disagreement", TWO)] == ["much", "some"]


def test_scales_of_scorers_do_not_matter() -> None:
    answers = [*opposed("x", 1.0, -2.0), *opposed("y", 2.0, -1.0), *opposed("z", 1.5, -1.4)]
    larger = [
        answer(own.prompt_id, own.text, {"good": own.values["good"], "short": 1e6 * own.values["short"]})
        for own in answers
    ]
    assert texts(answers, "disagreement", TWO) == texts(larger, "disagreement", TWO)
    assert spreads([*opposed("x", 1.0, 0.0)], ("good", "short", "none")) == {"good": 0.5}


def test_one_scorer_cannot_disagree() -> None:
    with pytest.raises(RaylignError, match="take --by uncertainty"):
        texts(SCORED, "disagreement")


def test_penalties_turn_round_and_people_are_no_scorers() -> None:
    inner = WeightedScoringBlock(scorers={"a": ANY, "b": ANY}, weights={"a": 1.0, "b": -1.0})
    block = WeightedScoringBlock(
        scorers={"length": ANY, "both": inner, "people": HumanScoringBlock()},
        weights={"length": -0.5, "both": -1.0, "people": 1.0},
    )
    assert directions(block) == {"length": -1.0, "both": -1.0, "both/a": -1.0, "both/b": 1.0}
    assert directions(ANY) == directions(HumanScoringBlock()) == {}


def test_a_count_is_of_all_that_were_chosen_so() -> None:
    seed = parse_config({}).run.seed
    chosen = [*choose(SCORED, "uncertainty", ANY, "run", seed)]
    first = new_pairs([], chosen, "uncertainty", 2)
    assert first == chosen[:2]
    assert new_pairs(first, chosen, "uncertainty", 2) == []
    assert new_pairs(first, chosen, "uncertainty", 3) == chosen[2:3]
    at_random = [*choose(SCORED, "random", ANY, "run", seed)]
    known = {pair.id for pair in first}
    assert new_pairs(first, at_random, "random", 9) == [pair for pair in at_random if pair.id not in known]
