"""Fillers: candidates and whole groups that are not there."""

from dataclasses import replace

import pytest
import torch

from tests.unit.losses.sums import CandidateLogps, preference_loss
from tests.unit.losses.test_losses import LISTWISE, OBJECTIVES, START, block, random_candidates


def padded(logps: CandidateLogps, size: int, value: float) -> CandidateLogps:
    """Filled up to `size` candidates with `value`; what a group has once stays."""
    extra = size - logps.policy.shape[1]

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        filler = tensor.new_full((tensor.shape[0], extra), value if tensor.is_floating_point() else 0)
        return torch.cat([tensor, filler], 1)

    values = {name: getattr(logps, name) for name in CandidateLogps.__slots__}
    return CandidateLogps(**{name: value if value.dim() == 1 else fill(value) for name, value in values.items()})


def stacked(*parts: CandidateLogps) -> CandidateLogps:
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in CandidateLogps.__slots__}
    return CandidateLogps(**(joined | {"policy": joined["policy"].detach().requires_grad_()}))


@pytest.mark.parametrize("loss_type", [name for name in LISTWISE if name != "sft"])
def test_groups_of_different_sizes_lose_what_each_loses_alone(loss_type: str) -> None:
    groups = [random_candidates(1, size, seed=size) for size in (2, 4, 3)]
    together = stacked(*(padded(group, 4, 7.0) for group in groups))
    output = preference_loss(together, block(loss_type), START)
    for row, group in enumerate(groups):
        alone = preference_loss(group, block(loss_type), START)
        torch.testing.assert_close(output.losses[row], alone.losses[0])
        assert output.rejected_rewards[row].item() == pytest.approx(alone.rejected_rewards.item())
        (expected,) = torch.autograd.grad(alone.losses.sum(), group.policy)
        (found,) = torch.autograd.grad(output.losses[row], together.policy, retain_graph=True)
        torch.testing.assert_close(found[row, : group.policy.shape[1]], expected[0])


@pytest.mark.parametrize("loss_type", LISTWISE)
def test_the_content_of_fillers_is_never_read(loss_type: str) -> None:
    group = random_candidates(2, 3)
    outputs = []
    for value in (0.0, 1e30, float("nan")):
        filled = stacked(padded(group, 5, value))
        output = preference_loss(filled, block(loss_type), START)
        (gradient,) = torch.autograd.grad(output.losses.sum(), filled.policy)
        assert (gradient[:, 3:] == 0).all() and gradient.isfinite().all()
        outputs.append(output.losses.tolist())
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_a_group_without_candidates_is_a_filler(loss_type: str) -> None:
    """It loses 0 and changes no other group's loss, also where groups see each other."""
    real = random_candidates(3, 2)
    absent = replace(random_candidates(1, 2, seed=9), mask=torch.zeros(1, 2, dtype=torch.bool))
    absent.reference.fill_(float("nan"))
    both = stacked(absent, real)
    output = preference_loss(both, block(loss_type), START)
    alone = preference_loss(real, block(loss_type), START)
    assert output.losses[0] == 0 and output.chosen_rewards[0] == 0
    assert output.losses[1:].tolist() == pytest.approx(alone.losses.tolist())
    (gradient,) = torch.autograd.grad(output.losses.sum(), both.policy)
    assert (gradient[0] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_a_micro_batch_of_fillers_still_has_a_gradient_of_zero(loss_type: str) -> None:
    """Every rank runs a backward pass, whatever it got."""
    nothing = replace(random_candidates(2, 2), mask=torch.zeros(2, 2, dtype=torch.bool))
    losses = preference_loss(nothing, block(loss_type), START).losses
    (gradient,) = torch.autograd.grad(losses.sum(), nothing.policy)
    assert losses.tolist() == [0, 0] and (gradient == 0).all()


@pytest.mark.parametrize("loss_type", [n for n in OBJECTIVES if n not in ("aot", "aot_unpaired", "sft", "cpo", "orpo")])
def test_groups_do_not_see_each_other(loss_type: str) -> None:
    logps = random_candidates(4, 2)
    every = preference_loss(logps, block(loss_type), START).losses
    for row in range(4):
        one = CandidateLogps(**{name: getattr(logps, name)[row : row + 1] for name in CandidateLogps.__slots__})
        assert preference_loss(one, block(loss_type), START).losses.item() == pytest.approx(every[row].item())
