"""Listwise losses and reward-model losses against hand-made lists, plain loops and each other."""

import math
from dataclasses import replace

import pytest
import torch

from raylign.losses import ld_weights, reward_model
from tests.unit.losses.sums import preference_loss
from tests.unit.losses.test_losses import LISTWISE, START, block, candidates, random_candidates

# r = (0.2, 0.5, -0.1) with beta 0.1, scores (3, 2, 1), one token each. e^r = 1.2214028, 1.6487213, 0.9048374.
RATIOS = [[2.0, 5.0, -1.0]]


@pytest.mark.parametrize(
    ("loss_type", "options", "expected"),
    [
        # ln(3.7749615 / 1.2214028) + ln(2.5535587 / 1.6487213)
        ("plackett_luce", {}, 1.1283905 + 0.4374880),
        # the same with beta 0.1, since each has one token
        ("list_mle", {"beta": 0.1}, 1.1283905 + 0.4374880),
        # weights 2^2 - 1, 2^1 - 1 over their mean 2
        ("list_mle", {"beta": 0.1, "position_aware": True}, 1.5 * 1.1283905 + 0.5 * 0.4374880),
        # softmax(3, 2, 1) = 0.6652410, 0.2447285, 0.0900306; -log softmax(r) = 1.1283905, 0.8283905, 1.4283905
        ("list_net", {}, 0.6652410 * 1.1283905 + 0.2447285 * 0.8283905 + 0.0900306 * 1.4283905),
        # ln(1 + e^0.3), ln(1 + e^-0.3), ln(1 + e^-0.6)
        ("all_pairs_logistic", {}, (0.8543552 + 0.5543552 + 0.4374880) / 3),
        ("all_pairs_hinge", {}, (1.3 + 0.7 + 0.4) / 3),
        # gains 2^1, 2^0.5, 2^0; places 2, 1, 3 have 1/D = 0.6309298, 1, 0.5
        (
            "lambda",
            {},
            0.5857864 * 0.3690702 * 0.8543552 + 1.0 * 0.1309298 * 0.5543552 + 0.4142136 * 0.5 * 0.4374880,
        ),
        # above the mean score 2 is the first only: sigmoid(-0.2), sigmoid(0.5), sigmoid(-0.1)
        ("kto", {}, (0.4501660 + 0.6224593 + 0.4750208) / 3),
        ("sft", {}, -2.0),
    ],
)
def test_lists_by_hand(loss_type: str, options: dict[str, object], expected: float) -> None:
    logps = candidates(RATIOS, scores=[[3.0, 2.0, 1.0]])
    assert preference_loss(logps, block(loss_type, **options), START).losses.item() == pytest.approx(expected, rel=1e-6)


def test_the_worst_reward_is_that_of_the_last_candidate() -> None:
    output = preference_loss(candidates(RATIOS), block("plackett_luce"), START)
    assert (output.chosen_rewards.item(), output.rejected_rewards.item()) == pytest.approx((0.2, -0.1))


def test_lists_of_two_are_dpo() -> None:
    logps = random_candidates(16, 2)
    dpo = preference_loss(logps, block("sigmoid"), START).losses
    for loss_type in ("plackett_luce", "all_pairs_logistic"):
        torch.testing.assert_close(preference_loss(logps, block(loss_type), START).losses, dpo)
    norm = preference_loss(logps, block("sigmoid_norm"), START).losses
    for position_aware in (False, True):
        losses = preference_loss(logps, block("list_mle", position_aware=position_aware), START).losses
        torch.testing.assert_close(losses, norm)
    hinge = preference_loss(logps, block("hinge"), START).losses
    torch.testing.assert_close(preference_loss(logps, block("all_pairs_hinge"), START).losses, hinge)


def test_plackett_luce_equals_the_product_of_choices_in_float64() -> None:
    logps = random_candidates(8, 5)
    losses = preference_loss(logps, block("plackett_luce"), START).losses
    strengths = torch.exp(0.1 * (logps.policy - logps.reference))
    plain = -torch.stack([strengths[:, k] / strengths[:, k:].sum(1) for k in range(5)]).prod(0).log()
    torch.testing.assert_close(losses, plain)
    found = torch.autograd.grad(losses.sum(), logps.policy)
    torch.testing.assert_close(found, torch.autograd.grad(plain.sum(), logps.policy))


@pytest.mark.parametrize("loss_type", LISTWISE)
def test_finite_differences_agree_with_the_gradient(loss_type: str) -> None:
    logps = random_candidates(3, 4)

    def losses(policy: torch.Tensor) -> torch.Tensor:
        return preference_loss(replace(logps, policy=policy), block(loss_type), START).losses

    assert torch.autograd.gradcheck(losses, logps.policy)


@pytest.mark.parametrize("loss_type", ["plackett_luce", "list_mle", "lambda", "all_pairs_logistic", "all_pairs_hinge"])
def test_ties_are_never_compared(loss_type: str) -> None:
    """All equal: nothing to learn. Two tied: their order in the list means nothing."""
    equal = candidates(RATIOS, scores=[[1.0, 1.0, 1.0]])
    losses = preference_loss(equal, block(loss_type), START).losses
    (gradient,) = torch.autograd.grad(losses.sum(), equal.policy)
    assert losses.item() == 0 and gradient.tolist() == [[0, 0, 0]]

    tied = [candidates([[2.0, *middle]], scores=[[3.0, 1.0, 1.0]]) for middle in ((5.0, -1.0), (-1.0, 5.0))]
    one, other = (preference_loss(logps, block(loss_type), START).losses.item() for logps in tied)
    assert one == pytest.approx(other) and one > 0


def test_ties_in_plackett_luce_by_hand() -> None:
    # r = (0.2, 0.5, -0.1), the first two tied: ln(1 + e^-0.3) + ln(1 + e^-0.6)
    logps = candidates(RATIOS, scores=[[1.0, 1.0, 0.0]])
    losses = preference_loss(logps, block("plackett_luce"), START).losses
    assert losses.item() == pytest.approx(0.5543552 + 0.4374880, rel=1e-6)


@pytest.mark.parametrize("loss_type", LISTWISE)
def test_long_and_extreme_lists_stay_finite(loss_type: str) -> None:
    named = block(loss_type, **({"position_aware": True} if loss_type == "list_mle" else {}))
    far = 1e4 / getattr(named, "beta", 1.0)
    logps = candidates([[-far * (k % 3) for k in range(200)]], [[-far * (k % 2) for k in range(200)]])
    losses = preference_loss(logps, named, START).losses
    (gradient,) = torch.autograd.grad(losses.sum(), logps.policy)
    assert losses.isfinite().all() and gradient.isfinite().all()


def test_lambda_learns_when_policy_equals_reference() -> None:
    """Equal rewards are placed in list order, so the weights are not all zero at the first step."""
    logps = candidates([[-3.0, -4.0, -5.0]], [[-3.0, -4.0, -5.0]])
    losses = preference_loss(logps, block("lambda"), START).losses
    (gradient,) = torch.autograd.grad(losses.sum(), logps.policy)
    assert losses.item() > 0 and gradient[0, 0] < 0 < gradient[0, 2]


def test_lambda_takes_scores_of_any_range() -> None:
    small, large = (candidates(RATIOS, scores=[[s * scale for s in (3.0, 2.0, 1.0)]]) for scale in (1.0, 1e6))
    one, other = (preference_loss(logps, block("lambda"), START).losses.item() for logps in (small, large))
    assert one == pytest.approx(other)


def test_reward_models_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, 0.2]), torch.tensor([0.3, 0.5])
    assert reward_model.bradley_terry(chosen, rejected).tolist() == pytest.approx([0.4031860, 0.8543552], rel=1e-6)
    with_margin = reward_model.bradley_terry(chosen, rejected, torch.tensor([0.7, 0.0]))
    assert with_margin.tolist() == pytest.approx([math.log(2), 0.8543552], rel=1e-6)
    assert reward_model.probit(chosen, rejected).tolist() == pytest.approx([0.2770239, 0.9621028], rel=1e-6)


def test_a_reward_models_ranking_ignores_fillers() -> None:
    rewards = torch.tensor([[0.2, 0.5, -0.1, torch.nan], [1.0, 0.3, 9.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    losses = reward_model.plackett_luce(rewards, torch.arange(4.0, 0, -1).expand(2, 4), mask)
    assert losses.tolist() == pytest.approx([1.1283905 + 0.4374880, 0.4031860], rel=1e-6)
    (gradient,) = torch.autograd.grad(losses.sum(), rewards)
    assert (gradient[~mask] == 0).all()


def test_ld_weights_by_hand() -> None:
    """LD-DPO: 3, 2 and 4 tokens share 2."""
    assert ld_weights([3, 2, 4], 0.5).tolist() == [1, 1, 0.5, 1, 1, 1, 1, 0.5, 0.5]
    assert ld_weights([3, 2], 1.0).tolist() == [1] * 5
