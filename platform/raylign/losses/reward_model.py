"""Losses that train a scalar reward model on preferences: rewards in, unreduced losses out."""

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from raylign.config.losses import (
    BradleyTerryRewardLossBlock,
    PlackettLuceRewardLossBlock,
    ProbitRewardLossBlock,
    RewardLossBlock,
)
from raylign.config.losses.reward_model import RewardPairLossBlock
from raylign.losses import listwise, pairwise
from raylign.losses.inputs import LossOutput, ends, list_mean


def require_pairs(sizes: Sequence[int], block: RewardLossBlock) -> None:
    """Raises ValueError when a loss of pairs gets preferences of other `sizes`."""
    if block.pairs_only and any(size != 2 for size in sizes):
        raise ValueError(
            f"{block.loss_type} compares 2 candidates, not {list(sizes)}; build pairs, or use loss_type=plackett_luce"
        )


def reward_loss(rewards: Tensor, scores: Tensor, mask: Tensor, block: RewardLossBlock) -> LossOutput:
    """The loss that `block` names, per preference: `rewards` and `scores` [G, K], best first, `mask` True on real ones.

    Every preference has a real candidate, and as many as `require_pairs` says; values beside the mask are never read.
    """
    real = rewards.masked_fill(~mask, 0.0)
    losses = _losses(real, scores, mask, block)
    if block.center_rewards_coefficient is not None:
        losses = losses + block.center_rewards_coefficient * centring(real, mask)
    chosen, rejected = ends(real.detach(), mask)
    return LossOutput(losses, chosen, rejected)


def _losses(rewards: Tensor, scores: Tensor, mask: Tensor, block: RewardLossBlock) -> Tensor:
    chosen, rejected = ends(rewards, mask)
    match block:
        case BradleyTerryRewardLossBlock():
            return bradley_terry(chosen, rejected, _margin(scores, mask, block))
        case ProbitRewardLossBlock():
            return probit(chosen, rejected, _margin(scores, mask, block))
        case PlackettLuceRewardLossBlock():
            return plackett_luce(rewards, scores, mask)
        case _:
            assert_never(block)


def _margin(scores: Tensor, mask: Tensor, block: RewardPairLossBlock) -> Tensor | None:
    if block.margin == "none":
        return None
    best, worst = ends(scores, mask)
    return block.margin_scale * (best - worst)


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """-log sigmoid(r(w) - r(l) - margin), [G]; the margin is Llama 2's (arXiv 2307.09288)."""
    return pairwise.sigmoid(_gap(chosen, rejected, margin))


def probit(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Thurstone-Mosteller: -log Phi(r(w) - r(l) - margin), [G]."""
    return pairwise.probit(_gap(chosen, rejected, margin))


def plackett_luce(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """-sum_k log [e^r(k) / sum_{j >= k} e^r(j)] over the real candidates of [G, K], those tied with k left out, [G]."""
    return listwise.plackett_luce(rewards.masked_fill(~mask, 0.0), listwise.beaten(scores, mask))


def centring(rewards: Tensor, mask: Tensor) -> Tensor:
    """(2 mean_k r(k))^2 over the real candidates, [G]: (r(w) + r(l))^2 of a pair, as in arXiv 2312.09244."""
    return (2 * list_mean(torch.where(mask, rewards, 0.0), mask)) ** 2


def _gap(chosen: Tensor, rejected: Tensor, margin: Tensor | None) -> Tensor:
    return chosen - rejected if margin is None else chosen - rejected - margin
