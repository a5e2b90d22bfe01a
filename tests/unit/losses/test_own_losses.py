"""A loss from outside: a function of the user's."""

import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from raylign.config import parse_config
from raylign.config.losses import FunctionLossBlock, Member, MixLossBlock, SftLossBlock, SigmoidLossBlock
from raylign.errors import ConfigError
from raylign.losses import LossState
from raylign.losses.preference import LOSSES
from tests.unit.losses.sums import preference_loss
from tests.unit.losses.test_losses import random_candidates

MINE = """
import torch
from torch.nn.functional import logsigmoid

def dpo(logps, block, state):
    h = logps.policy - logps.reference
    return -logsigmoid(block.beta * (h[:, 0] - h[:, 1]) - block.options.get("offset", 0.0))

def lists(logps, block, state):
    return (logps.policy * logps.mask).sum(1)

def flat(logps, block, state):
    return logps.policy.mean()

number = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_losses.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    return tmp_path


def test_a_function_of_the_users_is_a_loss_like_any_other(mine: Path) -> None:
    logps = random_candidates(4, 2)
    own = preference_loss(logps, FunctionLossBlock(function="my_losses:dpo"), LossState())
    known = preference_loss(logps, SigmoidLossBlock(), LossState())
    assert torch.equal(own.losses, known.losses) and torch.equal(own.chosen_rewards, known.chosen_rewards)
    shifted = FunctionLossBlock(function="my_losses:dpo", options={"offset": 1.0})
    assert (preference_loss(logps, shifted, LossState()).losses > own.losses).all()
    mix = MixLossBlock(losses=(FunctionLossBlock(function="my_losses:dpo"), SftLossBlock()))
    assert {"loss/function", "loss/sft"} <= preference_loss(logps, mix, LossState()).metrics.keys()


def test_it_says_itself_whether_it_takes_lists_and_reads_a_reference(mine: Path) -> None:
    lists = FunctionLossBlock(function="my_losses:lists", pairs_only=False, needs_reference=False)
    logps = random_candidates(3, 4)
    assert torch.equal(preference_loss(logps, lists, LossState()).losses, (logps.policy * logps.mask).sum(1))
    with pytest.raises(ValueError, match="function compares 2 candidates, not 4"):
        preference_loss(logps, FunctionLossBlock(function="my_losses:dpo"), LossState())
    loss = {"loss_type": "function", "function": "my_losses:dpo"}
    with pytest.raises(ConfigError, match="loss.loss_type=function reads reference log-probs"):
        parse_config({"loss": loss, "reference": {"policy": "none"}})
    parse_config({"loss": loss | {"needs_reference": False}, "reference": {"policy": "none"}})


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("my_losses:flat", r"gave \(\) for 4 groups; return a tensor \[G\]"),
        ("my_losses:number", "is a int, not a function"),
        ("my_losses:absent", "has no 'absent'; correct the name"),
        ("no_such_module:dpo", "no module 'no_such_module' in the working directory or installed"),
    ],
)
def test_what_is_no_loss_is_refused(function: str, complaint: str, mine: Path) -> None:
    with pytest.raises(ConfigError, match=f"loss.function={function}.*{complaint}"):
        preference_loss(random_candidates(4, 2), FunctionLossBlock(function=function), LossState())


def test_a_loss_from_outside_the_project_does_not_run(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mine / "project").mkdir()
    monkeypatch.chdir(mine / "project")
    with pytest.raises(ConfigError, match="no module 'my_losses' in the working directory or installed"):
        preference_loss(random_candidates(4, 2), FunctionLossBlock(function="my_losses:dpo"), LossState())


def test_every_block_has_a_function_and_every_function_a_block() -> None:
    assert {*get_args(Member)} == LOSSES.keys()
