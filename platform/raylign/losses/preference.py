"""A preference loss: any member of the tables, or a weighted sum of several, with its weights on tokens and pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from raylign.config.losses import BcoPairLossBlock, LossBlock, Member, MixLossBlock, members
from raylign.config.losses.pairwise import WeightedLossBlock
from raylign.losses import function, grpo, listwise, pairwise, reference_free, terms
from raylign.losses.inputs import LossInput, LossOutput, LossState, ends, real_groups, table


def ld_weights(lengths: Sequence[int], tail_weight: float) -> Tensor:
    """Token weights [sum(lengths)] of a group's completions, in order, for policy and reference log-probs alike.

    LD-DPO (arXiv 2409.06411): 1 on the tokens up to the group's shortest completion, `tail_weight` beyond.
    """
    shared = min(lengths)
    weights = [torch.full((length,), tail_weight).index_fill_(0, torch.arange(shared), 1.0) for length in lengths]
    return torch.cat(weights)


def wpo_weights(certainty: Tensor, mask: Tensor) -> Tensor:
    """Pair weights [G] from `LossInput.certainty`, detached.

    WPO with sampled alignment (arXiv 2406.11827): min(1, w(x, y_w) w(x, y_l)),
    w(x, y) = exp(1/|y| sum_t [log p(y_t) - log sum_v p(v)^2]).
    """
    return torch.exp((certainty * mask).sum(1).clamp_max(0.0)).detach()


LOSSES = table(pairwise.LOSSES, reference_free.LOSSES, listwise.LOSSES, grpo.LOSSES, terms.LOSSES, function.LOSSES)


def preference_loss(logps: LossInput, block: LossBlock, state: LossState) -> LossOutput:
    """The loss that `block` names, per preference."""
    size = logps.mask.shape[1]
    if block.pairs_only and size != 2:
        raise ValueError(
            f"{block.loss_type} compares 2 candidates, not {size}; build pairs, or use a listwise loss_type such as "
            "plackett_luce"
        )
    some, everywhere = real_groups(logps)
    losses, metrics = _losses_and_metrics(some, block, state)
    first = block.losses[0] if isinstance(block, MixLossBlock) else block
    chosen, rejected = ends(LOSSES[type(first)].rewards(some, first).detach(), some.mask)
    return LossOutput(
        everywhere(losses),
        everywhere(chosen),
        everywhere(rejected),
        {name: everywhere(values.detach()) for name, values in metrics.items()},
    )


def next_state(state: LossState, block: LossBlock, means: Mapping[str, float]) -> LossState:
    """The state of the next step, from the means of `LossOutput.metrics` over all preferences of this step."""
    for member in members(block):
        match member:
            case BcoPairLossBlock(reward_shift_decay=float(decay)):
                shift = decay * state.reward_shift + (1 - decay) * means["reward_shift"]
                state = replace(state, reward_shift=shift)
    return state


def under_new_reference(state: LossState, block: LossBlock, means: Mapping[str, float]) -> LossState:
    """The state when the reference has become another one, from the means over the preferences of the next step."""
    return replace(state, reward_shift=means["reward_shift"]) if block.needs_reward_shift else state


def _losses_and_metrics(logps: LossInput, block: LossBlock, state: LossState) -> tuple[Tensor, Mapping[str, Tensor]]:
    if not isinstance(block, MixLossBlock):
        return _losses(logps, block, state), LOSSES[type(block)].metrics(logps, block, state)
    parts = {member.loss_type: _losses(logps, member, state) for member in block.losses}
    total = torch.stack([weight * part for weight, part in zip(block.weights, parts.values(), strict=True)]).sum(0)
    metrics = {f"loss/{name}": part for name, part in parts.items()}
    for member in block.losses:
        metrics |= LOSSES[type(member)].metrics(logps, member, state)
    return total, metrics


def _losses(logps: LossInput, block: Member, state: LossState) -> Tensor:
    losses = LOSSES[type(block)].losses(logps, block, state)
    if isinstance(block, WeightedLossBlock) and block.use_weighting:
        return losses * wpo_weights(logps.certainty, logps.mask)
    return losses
