"""DPO against numbers worked out by hand, autograd and the paper's gradient."""

import math

import pytest
import torch
from torch import Tensor

from raylign.config.blocks import SigmoidLossBlock
from raylign.losses import PairLogps, preference_loss

BETA = 0.1
BLOCK = SigmoidLossBlock(beta=BETA)

# beta = 0.1. Log-ratios (chosen, rejected), delta = beta * (chosen - rejected), loss = ln(1 + e^-delta):
#   row 0: -10 - -12 = 2,  -20 - -15 = -5 -> delta 0.7   -> ln(1 + 0.4965853) = 0.4031860
#   row 1: -30 - -29 = -1,  -8 - -10 = 2  -> delta -0.3  -> ln(1 + 1.3498588) = 0.8543552
#   row 2:  -5 -  -5 = 0,   -7 - -7 = 0   -> delta 0     -> ln 2              = 0.6931472
POLICY_CHOSEN = (-10.0, -30.0, -5.0)
POLICY_REJECTED = (-20.0, -8.0, -7.0)
REFERENCE_CHOSEN = (-12.0, -29.0, -5.0)
REFERENCE_REJECTED = (-15.0, -10.0, -7.0)


def hand_made(dtype: torch.dtype = torch.float32) -> PairLogps:
    def leaf(values: tuple[float, ...], grad: bool) -> Tensor:
        return torch.tensor(values, dtype=dtype, requires_grad=grad)

    return PairLogps(
        leaf(POLICY_CHOSEN, True),
        leaf(POLICY_REJECTED, True),
        leaf(REFERENCE_CHOSEN, False),
        leaf(REFERENCE_REJECTED, False),
    )


def gradients(logps: PairLogps) -> tuple[Tensor, ...]:
    """Of the summed losses: in the chosen and in the rejected policy log-probs."""
    total = preference_loss(logps, BLOCK).losses.sum()
    return torch.autograd.grad(total, (logps.policy_chosen, logps.policy_rejected))


def with_gap(gap: float) -> PairLogps:
    """One pair whose chosen log-ratio exceeds the rejected one by `gap`."""
    zero = torch.zeros(1)
    return PairLogps(torch.tensor([gap], requires_grad=True), zero.clone().requires_grad_(), zero, zero)


def test_losses_by_hand() -> None:
    assert preference_loss(hand_made(), BLOCK).losses.tolist() == pytest.approx([0.4031860, 0.8543552, 0.6931472])


def test_rewards_are_beta_times_the_log_ratio_as_trl_defines_them() -> None:
    output = preference_loss(hand_made(), BLOCK)
    assert output.chosen_rewards.tolist() == pytest.approx([0.2, -0.1, 0.0])
    assert output.rejected_rewards.tolist() == pytest.approx([-0.5, 0.2, 0.0])


def test_losses_carry_gradients_and_rewards_do_not() -> None:
    output = preference_loss(hand_made(), BLOCK)
    assert output.losses.requires_grad and output.losses.shape == (3,)
    assert not output.chosen_rewards.requires_grad and not output.rejected_rewards.requires_grad


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_a_policy_equal_to_the_reference_loses_ln_2_exactly(beta: float) -> None:
    logps = torch.tensor([-3.0, -700.0])
    losses = preference_loss(PairLogps(logps, logps - 5, logps, logps - 5), SigmoidLossBlock(beta=beta)).losses
    assert losses.tolist() == [pytest.approx(math.log(2), abs=1e-7)] * 2


def test_the_gradient_is_the_papers_weight() -> None:
    """Rafailov et al. 2023, section 4: beta * sigmoid(rejected - chosen reward) raises chosen and lowers rejected."""
    logps = hand_made(torch.float64)
    chosen, rejected = gradients(logps)
    # sigmoid(-0.7) = 0.3318122, sigmoid(0.3) = 0.5744425, sigmoid(0) = 0.5, each times beta
    weights = [0.03318122, 0.05744425, 0.05]
    assert chosen.tolist() == pytest.approx([-weight for weight in weights], rel=1e-6)
    assert rejected.tolist() == pytest.approx(weights, rel=1e-6)


def test_loss_and_gradient_equal_the_plain_formula_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 64, generator=generator, dtype=torch.float64) * 20
    chosen, rejected = values[0].clone().requires_grad_(), values[1].clone().requires_grad_()
    output = preference_loss(PairLogps(chosen, rejected, values[2], values[3]), BLOCK)
    delta = BETA * ((chosen - values[2]) - (rejected - values[3]))
    plain = torch.log1p(torch.exp(-delta))
    torch.testing.assert_close(output.losses, plain, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(output.losses.sum(), (chosen, rejected))
    expected = torch.autograd.grad(plain.sum(), (chosen, rejected))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_finite_differences_agree_with_the_gradient() -> None:
    logps = hand_made(torch.float64)

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        pair = PairLogps(chosen, rejected, logps.reference_chosen, logps.reference_rejected)
        return preference_loss(pair, BLOCK).losses

    assert torch.autograd.gradcheck(losses, (logps.policy_chosen, logps.policy_rejected))


@pytest.mark.parametrize(
    ("delta", "loss", "gradient"),
    [
        (1e4, 0.0, 0.0),
        (100.0, 0.0, 0.0),  # e^-100 = 4e-44: below fp32's smallest normal number
        (-100.0, 100.0, -BETA),
        (-1e4, 1e4, -BETA),
    ],
)
def test_extreme_margins_stay_finite_in_fp32(delta: float, loss: float, gradient: float) -> None:
    logps = with_gap(delta / BETA)
    chosen, rejected = gradients(logps)
    losses = preference_loss(logps, BLOCK).losses
    assert losses.dtype == torch.float32
    assert losses.item() == pytest.approx(loss, rel=1e-6, abs=1e-30)
    assert chosen.item() == pytest.approx(gradient, rel=1e-6, abs=1e-30)
    assert rejected.item() == pytest.approx(-gradient, rel=1e-6, abs=1e-30)


def test_the_loss_falls_as_the_margin_grows() -> None:
    losses = [preference_loss(with_gap(gap), BLOCK).losses.item() for gap in (-50.0, -1.0, 0.0, 1.0, 50.0)]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 5


def test_pairs_do_not_see_each_other() -> None:
    both = preference_loss(hand_made(), BLOCK).losses
    for row in range(3):
        one = PairLogps(
            *(torch.tensor([v[row]]) for v in (POLICY_CHOSEN, POLICY_REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED))
        )
        assert preference_loss(one, BLOCK).losses.item() == pytest.approx(both[row].item(), rel=1e-6)
