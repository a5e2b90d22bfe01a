"""Pairwise losses of the policy alone: tensors [G] in, losses [G] out."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from raylign.losses.pairwise import sigmoid
from raylign.losses.stable import bounded_expm1, log1mexp

# Odds are infinite at probability 1; 1 - e^-1e-6 is the last step that fp32 resolves to three digits.
_LARGEST_MEAN_LOGP = -1e-6


def alphapo_scores(mean_logps: Tensor, alpha: float) -> Tensor:
    """AlphaPO (arXiv 2501.03884): (1 - p^-alpha) / alpha, p = pi(y)^(1/|y|); log p when alpha is 0."""
    return mean_logps if alpha == 0 else -bounded_expm1(-alpha * mean_logps) / alpha


def simpo(score_gap: Tensor, beta: float, gamma: float, eps: float) -> Tensor:
    """SimPO, Meng et al. 2024 (arXiv 2405.14734) eq. 6: -log sigmoid(beta (log p(w) - log p(l)) - gamma)."""
    return sigmoid(beta * score_gap - gamma, 1 - eps)


def cpo(logp_gap: Tensor, nll: Tensor, beta: float, alpha: float, eps: float) -> Tensor:
    """CPO, Xu et al. 2024 (arXiv 2401.08417): -log sigmoid(beta (log pi(w) - log pi(l))) + alpha NLL(w)."""
    return sigmoid(beta * logp_gap, 1 - eps) + alpha * nll


def log_odds_ratio(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor) -> Tensor:
    """log odds(w) - log odds(l), odds = p / (1 - p), p = pi(y)^(1/|y|)."""
    chosen, rejected = (logps.clamp_max(_LARGEST_MEAN_LOGP) for logps in (chosen_mean_logps, rejected_mean_logps))
    return (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))


def orpo(log_odds: Tensor, nll: Tensor, beta: float) -> Tensor:
    """ORPO, Hong et al. 2024 (arXiv 2403.07691) eq. 6-7: NLL(w) - beta log sigmoid(log odds ratio)."""
    return nll - beta * logsigmoid(log_odds)
