"""A campaign of XPO over the roles of tests.fakes: who answers, what is paired, what is lost."""

import math
from pathlib import Path
from typing import Any

import pytest

from raylign.config import OnlineDpoConfig, parse_config
from tests.unit.run.test_round import CONFIG, Open, open_desk

__all__ = ["open_desk"]
ALPHA = 0.1


def config_in(folder: Path) -> OnlineDpoConfig:
    return parse_config(
        CONFIG
        | {
            "sampling": {"num_generations": 4, "reference_generations": 2},
            "model": {"lora": {"r": 4}},
            "pairing": {"type": "policy_reference"},
            "loss": {
                "loss_type": "mix",
                "losses": [{"loss_type": "sigmoid", "beta": 0.1}, {"loss_type": "xpo"}],
                "loss_weights": [1, ALPHA],
            },
        },
        [f"run.dir={folder}/runs"],
    )


def test_the_second_round_by_hand(open_desk: Open, tmp_path: Path) -> None:
    """Version 1 says "good" once and twice; the initial model twice, which version 1 said already, and three times.

    The only sample of the reference that is left, y~, has 4 tokens and wins: h = -4/2 + 4 = 2 and log pi(y~) = -2.
    The policy's has 2 or 3 tokens: h = 1 or 1.5.
    """
    desk = open_desk(config_in(tmp_path))
    desk.round(1)
    report, _ = desk.round(2)
    rows = desk.rows(2, "candidates")
    assert [(row["index"], row["policy_version"]) for row in rows[:4]] == [(0, 1), (1, 1), (2, 0), (3, 0)]
    assert [row["logprobs"] for row in rows[:4:3]] == [[-0.5] * 2, [-1.0] * 4]
    preferences: list[Any] = desk.rows(2, "preferences")
    assert {row["prompt_id"] for row in preferences} == {"a", "b"}
    expected = []
    for row in preferences:
        (chosen, rejected), logps = row["indices"], row["reference_logps"]
        assert chosen == 3 and rejected in (0, 1) and logps == [-4.0, -2.0 - rejected]
        expected.append(math.log1p(math.exp(-0.1 * (2 - (1 + rejected / 2)))) - ALPHA * 2)
    assert sorted(step["loss"] for step in report.steps) == pytest.approx(sorted(expected))


def test_the_first_rounds_policy_is_the_reference(open_desk: Open, tmp_path: Path) -> None:
    """h is 0, so DPO loses ln 2; the bonus is the mean log-prob of both, minus their tokens."""
    desk = open_desk(config_in(tmp_path))
    report, _ = desk.round(1)
    assert {row["policy_version"] for row in desk.rows(1, "candidates")} == {0}
    lengths = [[len(ids) for ids in row["token_ids"]] for row in desk.rows(1, "preferences")]  # type: ignore[attr-defined]
    expected = [math.log(2) - ALPHA * sum(pair) / 2 for pair in lengths]
    assert sorted(step["loss"] for step in report.steps) == pytest.approx(sorted(expected))
