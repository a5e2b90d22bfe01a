"""XPO's exploration bonus: by hand, against the paper's objective written out, and its gradient."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from raylign.config.losses import LossBlock
from raylign.losses.terms import exploration_bonus
from tests.unit.losses.sums import preference_loss
from tests.unit.losses.test_losses import START, block, candidates, random_candidates
from tests.unit.losses.test_losses_masks import padded, stacked

ALPHA, BETA = 0.03, 0.2


def xpo(alpha: float = ALPHA, loss_type: str = "sigmoid") -> LossBlock:
    members = [{"loss_type": loss_type, "beta": BETA}, {"loss_type": "xpo"}]
    return block("mix", losses=members, loss_weights=[1.0, alpha])


def test_the_bonus_by_hand() -> None:
    """The mean over the samples of the reference: -5, (-1 - 4) / 2, and nothing."""
    policy = torch.tensor([[-3.0, -5.0, -9.0], [-1.0, -4.0, -7.0], [-2.0, -2.0, -2.0]])
    from_reference = torch.tensor([[False, True, False], [True, True, False], [False, False, False]])
    assert exploration_bonus(policy, from_reference).tolist() == [-5.0, -2.5, 0.0]


def test_the_mix_by_hand() -> None:
    """Both pairs have h(w) - h(l) = 0, so that DPO's part is ln 2; the reference answered last, then first."""
    logps = candidates(
        [[-3.0, -5.0], [-2.0, -7.0]], [[-3.0, -5.0], [-2.0, -7.0]], from_reference=[[False, True], [True, False]]
    )
    output = preference_loss(logps, xpo(alpha=0.1), START)
    assert output.losses.tolist() == pytest.approx([0.693147 - 0.5, 0.693147 - 0.2], abs=1e-6)
    assert output.metrics["loss/xpo"].tolist() == [-5.0, -2.0]
    (gradient,) = torch.autograd.grad(output.losses.sum(), logps.policy)
    # DPO pulls with beta / 2 = 0.1 at a margin of 0; the bonus adds alpha to the reference's sample, whoever won.
    torch.testing.assert_close(gradient, torch.tensor([[-0.1, 0.2], [0.0, 0.1]]))


def test_losses_and_gradients_equal_the_objective_of_trls_trainer_in_float64() -> None:
    """Told by policy and reference sample and who was preferred, as XPO's trainer in TRL is."""
    logps = random_candidates(16, 2)
    policy_won = torch.arange(16) % 3 == 0
    logps = replace(logps, from_reference=torch.stack([~policy_won, policy_won], 1))
    own, of_reference = torch.where(policy_won, 0, 1), torch.where(policy_won, 1, 0)
    rows = torch.arange(16)
    policy_own, policy_reference = logps.policy[rows, own], logps.policy[rows, of_reference]
    reference_own, reference_reference = logps.reference[rows, own], logps.reference[rows, of_reference]
    chosen = torch.where(policy_won, policy_own - reference_own, policy_reference - reference_reference)
    rejected = torch.where(policy_won, policy_reference - reference_reference, policy_own - reference_own)
    expected = -logsigmoid(BETA * (chosen - rejected)) + ALPHA * policy_reference
    losses = preference_loss(logps, xpo(), START).losses
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(losses.sum(), logps.policy, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), logps.policy), rtol=1e-12, atol=1e-12)


def test_the_gradient_is_that_of_small_differences() -> None:
    logps = random_candidates(4, 3)

    def losses(policy: torch.Tensor) -> torch.Tensor:
        return preference_loss(replace(logps, policy=policy), xpo(loss_type="plackett_luce"), START).losses

    assert torch.autograd.gradcheck(losses, (logps.policy,))


@pytest.mark.parametrize("value", [0.0, 1e30, float("nan")])
def test_fillers_are_no_samples_of_the_reference(value: float) -> None:
    groups = [random_candidates(1, size, seed=size) for size in (2, 4)]
    groups = [replace(group, from_reference=torch.ones_like(group.from_reference)) for group in groups]
    together = stacked(*(padded(group, 4, value) for group in groups))
    named = xpo(loss_type="plackett_luce")
    bonus = preference_loss(together, named, START).metrics["loss/xpo"]
    torch.testing.assert_close(bonus, torch.stack([group.policy.detach().mean() for group in groups]))


def test_the_bonus_reads_no_reference_log_probs() -> None:
    logps = random_candidates(4, 2)
    broken = replace(logps, reference=torch.full_like(logps.reference, torch.nan))
    mix = block("mix", losses=[{"loss_type": "simpo"}, {"loss_type": "xpo"}])
    outputs = [preference_loss(some, mix, START).losses.tolist() for some in (logps, broken)]
    assert outputs[0] == outputs[1]
