"""Prompts that are always right or always wrong are drawn no more."""

import pytest

from raylign.config import parse_config
from raylign.config.blocks import CurriculumBlock
from raylign.errors import ConfigError, PromptError
from raylign.records import Prompt
from raylign.sampling.curriculum import Outcome, draw_open, settled

BLOCK = CurriculumBlock(right_from=1.0, wrong_to=0.0, patience=2)
PROMPTS = tuple(Prompt(name, (), (1,)) for name in "abcd")
RIGHT, WRONG, MIXED, MUTE = (1.0, 1.0), (0.0, -1.0), (0.0, 1.0), (1.0, None)


def rounds(*outcomes: dict[str, tuple[float | None, ...]]) -> list[list[Outcome]]:
    return [[Outcome(name, scores) for name, scores in of_round.items()] for of_round in outcomes]


def test_it_takes_patience_rounds_in_a_row() -> None:
    once = rounds({"a": RIGHT, "b": WRONG, "c": MIXED, "d": MUTE})
    assert settled(once, BLOCK) == {}
    twice = [*once, *rounds({"a": RIGHT, "b": WRONG, "c": RIGHT, "d": RIGHT})]
    assert settled(twice, BLOCK) == {"a": "right", "b": "wrong"}
    assert settled([*twice, *rounds({"a": MIXED, "c": RIGHT})], BLOCK) == {"b": "wrong", "c": "right"}


def test_right_after_wrong_begins_anew() -> None:
    assert settled(rounds({"a": WRONG}, {"a": RIGHT}), BLOCK) == {}


def test_a_bound_that_is_not_set_leaves_nothing_out() -> None:
    only_wrong = CurriculumBlock(wrong_to=0.0)
    assert settled(rounds({"a": RIGHT, "b": WRONG}), only_wrong) == {"b": "wrong"}


def test_open_prompts_are_drawn_least_often_first() -> None:
    history = rounds({"a": RIGHT, "b": MIXED}, {"a": RIGHT, "b": MIXED}, {"c": MIXED})
    drawn = draw_open(PROMPTS, history, 3, BLOCK, seed=1)
    assert [prompt.id for prompt in drawn.prompts] == ["d", "c", "b"]
    assert (drawn.right, drawn.wrong) == (1, 0)
    assert drawn == draw_open(PROMPTS, history, 3, BLOCK, seed=1)


def test_the_seed_orders_equals() -> None:
    orders = {tuple(p.id for p in draw_open(PROMPTS, [], 4, BLOCK, seed=seed).prompts) for seed in range(20)}
    assert len(orders) > 5


def test_nothing_left_is_an_error_with_the_numbers() -> None:
    history = rounds({"a": RIGHT, "b": WRONG, "c": WRONG, "d": RIGHT}) * 2
    with pytest.raises(PromptError, match="round 3: .* none of 4 prompts \\(2 always right, 2 always wrong\\)"):
        draw_open(PROMPTS, history, 4, BLOCK, seed=1)


def test_bounds_are_checked() -> None:
    with pytest.raises(ConfigError, match="neither right_from nor wrong_to is set"):
        parse_config({}, ["schedule.curriculum={patience: 2}"])
    with pytest.raises(ConfigError, match="wrong_to=2 is not below right_from=1"):
        parse_config({}, ["schedule.curriculum={right_from: 1, wrong_to: 2}"])
