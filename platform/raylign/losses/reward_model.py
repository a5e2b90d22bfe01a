"""Losses that train a scalar reward model on preferences: rewards in, unreduced losses out."""

import torch
from torch import Tensor

from raylign.losses import listwise, pairwise


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center_rewards_coefficient: float | None = None
) -> Tensor:
    """-log sigmoid(r(w) - r(l) - margin) + center_rewards_coefficient (r(w) + r(l))^2, [G].

    The margin is Llama 2's (arXiv 2307.09288), the centring term that of arXiv 2312.09244.
    """
    losses = pairwise.sigmoid(_gap(chosen, rejected, margin))
    return (
        losses if center_rewards_coefficient is None else losses + center_rewards_coefficient * (chosen + rejected) ** 2
    )


def probit(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Thurstone-Mosteller: -log Phi(r(w) - r(l) - margin), [G]."""
    return pairwise.probit(_gap(chosen, rejected, margin))


def plackett_luce(rewards: Tensor, mask: Tensor) -> Tensor:
    """-sum_k log [e^r(k) / sum_{j >= k} e^r(j)] over the real candidates of [G, K], best first, [G]."""
    places = torch.arange(rewards.shape[1], 0, -1, device=rewards.device).expand_as(rewards)
    return listwise.plackett_luce(rewards.masked_fill(~mask, 0.0), listwise.beaten(places, mask))


def _gap(chosen: Tensor, rejected: Tensor, margin: Tensor | None) -> Tensor:
    return chosen - rejected if margin is None else chosen - rejected - margin
