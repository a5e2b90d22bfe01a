"""Preference losses: pure functions, tensors in, unreduced losses and detached metrics out."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from raylign.config.blocks import SigmoidLossBlock


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Summed completion log-probabilities (nats) of P pairs. Made by the trainer, read by losses.

    Each tensor is fp32 of shape [P]; `policy_*` carry gradients, `reference_*` do not.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Unreduced `losses` [P] with gradients, and the implicit rewards beta * log(pi/pi_ref) [P], detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def preference_loss(logps: PairLogps, block: SigmoidLossBlock) -> LossOutput:
    """The loss that `block` names, per pair."""
    chosen_logratios = logps.policy_chosen - logps.reference_chosen
    rejected_logratios = logps.policy_rejected - logps.reference_rejected
    # DPO, Rafailov et al. 2023 (arXiv 2305.18290) eq. 7: -log sigmoid(beta * (chosen - rejected log-ratio))
    losses = -logsigmoid(block.beta * (chosen_logratios - rejected_logratios))
    with torch.no_grad():
        return LossOutput(losses, block.beta * chosen_logratios.detach(), block.beta * rejected_logratios.detach())
