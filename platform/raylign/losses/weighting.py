"""Weights on tokens and on pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
