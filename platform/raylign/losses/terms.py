"""Unpaired losses and the terms of a mix."""

import torch
from torch import Tensor


def kto(
    policy: Tensor,
    reference: Tensor,
    is_desirable: Tensor,
    kl: float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, Ethayarajh et al. 2024 (arXiv 2402.01306), elementwise: lambda_y - v(x, y) with

    v = lambda_D sigmoid(beta (h - kl)) for desirable and lambda_U sigmoid(beta (kl - h)) for undesirable completions.
    `kl` >= 0 estimates KL(pi || pi_ref), on other completions than these, and takes no gradient.
    """
    gain = beta * (policy - reference - kl)
    desirable, undesirable = torch.sigmoid(-gain), torch.sigmoid(gain)
    return torch.where(is_desirable, desirable_weight * desirable, undesirable_weight * undesirable)


def nll(chosen_logps: Tensor, chosen_lengths: Tensor, mean_tokens: float | None) -> Tensor:
    """-log pi(w) / mean |w|: its mean over the step is the step's token mean, -sum log pi(w) / sum |w|."""
    return -chosen_logps / (chosen_lengths.double().mean() if mean_tokens is None else mean_tokens)


def kl_penalty(logratios: Tensor) -> Tensor:
    """Schulman's k2 estimator h^2 / 2 of KL(pi || pi_ref), elementwise.

    Its gradient h grad log pi is, on samples of the policy, unbiased for that of the reverse KL.
    """
    return logratios**2 / 2


def exploration_bonus(policy: Tensor, from_reference: Tensor) -> Tensor:
    """XPO's bonus, Xie et al. 2024 (arXiv 2405.21046) alg. 1: log pi(y~) in nats, y~ a sample of the reference.

    [G, K] log-probs -> [G], the mean over the candidates where `from_reference` [G, K] is True; 0 where none is.
    """
    return (policy * from_reference).sum(1) / from_reference.sum(1).clamp_min(1)
