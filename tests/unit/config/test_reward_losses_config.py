"""What the blocks of reward models promise, refuse and compute."""

import math
import re
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from raylign.config.losses import (
    BradleyTerryRewardLossBlock,
    PlackettLuceRewardLossBlock,
    RewardLossBlock,
    RewardLossUnion,
)
from raylign.losses.reward_model import require_pairs, reward_loss

ADAPTER: TypeAdapter[RewardLossBlock] = TypeAdapter(RewardLossUnion)
PAIRS = torch.tensor([[1.0, 0.3], [0.2, 0.5]])
SCORES = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
ALL = torch.ones(2, 2, dtype=torch.bool)


def block(loss_type: str, **options: Any) -> RewardLossBlock:
    return ADAPTER.validate_python({"loss_type": loss_type, **options})


def loss_of(loss_type: str, **options: Any) -> list[float]:
    found: list[float] = reward_loss(PAIRS, SCORES, ALL, block(loss_type, **options)).losses.tolist()
    return found


@pytest.mark.parametrize("loss_type", ["bradley_terry", "probit", "plackett_luce"])
def test_blocks_say_what_they_read(loss_type: str) -> None:
    named = block(loss_type)
    assert named.pairs_only == (loss_type != "plackett_luce")
    assert not named.needs_reference and named.tail_weight == 1.0 and named.center_rewards_coefficient is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmoid"}, "'bradley_terry', 'probit', 'plackett_luce'"),
        ({"loss_type": "bradley_terry", "center_rewards_coefficient": 0.0}, "greater than 0"),
        ({"loss_type": "bradley_terry", "margin_scale": 2.0}, "margin_scale=2 scales no margin; set margin=scores"),
        ({"loss_type": "bradley_terry", "margin": "scores", "margin_scale": -1.0}, "greater than 0"),
        ({"loss_type": "plackett_luce", "margin": "scores"}, "Extra inputs are not permitted"),
        ({"loss_type": "probit", "beta": 0.1}, "Extra inputs are not permitted"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python(options)


def test_losses_by_hand() -> None:
    """Gaps 0.7 and -0.3; the scores' gaps are 2 and 0."""
    assert loss_of("bradley_terry") == pytest.approx([0.4031860, 0.8543552], rel=1e-6)
    assert loss_of("probit") == pytest.approx([0.2770239, 0.9621028], rel=1e-6)
    half = loss_of("bradley_terry", margin="scores", margin_scale=0.35)
    assert half == pytest.approx([math.log(2), 0.8543552], rel=1e-6)
    # Equal scores are not compared: the second pair has nothing to learn.
    assert loss_of("plackett_luce") == pytest.approx([0.4031860, 0.0], rel=1e-6)


def test_centring_adds_the_square_of_twice_the_mean() -> None:
    """TRL's (r_w + r_l)^2 of a pair: 1.3^2 and 0.7^2; of three candidates (2 (1 + 0.5 - 3) / 3)^2 = 1."""
    centred = loss_of("bradley_terry", center_rewards_coefficient=0.01)
    assert centred == pytest.approx([0.4031860 + 0.0169, 0.8543552 + 0.0049], rel=1e-6)
    rewards, mask = torch.tensor([[1.0, 0.5, -3.0, 77.0]]), torch.tensor([[True, True, True, False]])
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    plain = reward_loss(rewards, scores, mask, PlackettLuceRewardLossBlock()).losses
    other = reward_loss(rewards, scores, mask, PlackettLuceRewardLossBlock(center_rewards_coefficient=0.5)).losses
    assert (other - plain).tolist() == pytest.approx([0.5])


def test_rewards_of_the_ends_and_no_gradient_into_them() -> None:
    rewards = torch.tensor([[2.0, 1.0, -1.0], [4.0, 3.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 0.0, 0.0]])
    found = reward_loss(rewards, scores, mask, PlackettLuceRewardLossBlock())
    assert found.chosen_rewards.tolist() == [2.0, 4.0] and found.rejected_rewards.tolist() == [-1.0, 3.0]
    assert not found.chosen_rewards.requires_grad
    (gradient,) = torch.autograd.grad(found.losses.sum(), rewards)
    assert gradient[1, 2] == 0.0 and (gradient[0] != 0).all()


def test_a_loss_of_pairs_refuses_lists() -> None:
    for sizes in ((3,), (2, 1)):
        with pytest.raises(
            ValueError, match=rf"bradley_terry compares 2 candidates, not {re.escape(str(list(sizes)))}"
        ):
            require_pairs(sizes, BradleyTerryRewardLossBlock())
    require_pairs((2, 2), BradleyTerryRewardLossBlock())
    require_pairs((3, 1), PlackettLuceRewardLossBlock())
