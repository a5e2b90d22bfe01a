"""Pairwise losses of the policy alone: tensors [G] in, losses [G] out."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from raylign.config.losses.reference_free import (
    AlphapoLossBlock,
    CpoLossBlock,
    MeanLogpLossBlock,
    OrpoLossBlock,
    SimpoLossBlock,
)
from raylign.losses.inputs import LossInput, LossState, difference, ends, loss_of, nll, table
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


def _scores_per_token(logps: LossInput, block: MeanLogpLossBlock) -> Tensor:
    alpha = block.alpha if isinstance(block, AlphapoLossBlock) else 0.0
    return alphapo_scores(logps.policy / logps.lengths, alpha)


def _simpo(logps: LossInput, block: MeanLogpLossBlock, state: LossState) -> Tensor:
    gap = difference(_scores_per_token(logps, block), logps.mask)
    return simpo(gap, block.beta, block.simpo_gamma, block.label_smoothing)


def _mean_rewards(logps: LossInput, block: MeanLogpLossBlock) -> Tensor:
    return block.beta * _scores_per_token(logps, block)


def _cpo(logps: LossInput, block: CpoLossBlock, state: LossState) -> Tensor:
    gap = difference(logps.policy, logps.mask)
    return cpo(gap, nll(logps, state), block.beta, block.cpo_alpha, block.label_smoothing)


def _log_odds(logps: LossInput) -> Tensor:
    return log_odds_ratio(*ends(logps.policy / logps.lengths, logps.mask))


def _orpo_metrics(logps: LossInput, block: OrpoLossBlock, state: LossState) -> dict[str, Tensor]:
    log_odds = _log_odds(logps)
    return {"nll_loss": nll(logps, state), "log_odds_ratio": logsigmoid(log_odds), "log_odds_chosen": log_odds}


LOSSES = table(
    loss_of(SimpoLossBlock, _simpo, rewards=_mean_rewards),
    loss_of(AlphapoLossBlock, _simpo, rewards=_mean_rewards),
    loss_of(
        CpoLossBlock,
        _cpo,
        rewards=lambda c, b: b.beta * c.policy,
        metrics=lambda c, b, state: {"nll_loss": nll(c, state)},
    ),
    loss_of(
        OrpoLossBlock,
        lambda c, b, state: orpo(_log_odds(c), nll(c, state), b.beta),
        rewards=lambda c, b: b.beta * c.policy / c.lengths,
        metrics=_orpo_metrics,
    ),
)
"""In each entry c are the candidates and b the block."""
