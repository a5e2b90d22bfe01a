"""GRPO and its kin: token losses [N] weighed by the advantages [G, K] of their completions, summed up as losses [G]."""

import torch
from torch import Tensor

from raylign.config.losses.grpo import GrpoLossBlock
from raylign.losses.inputs import LossInput, LossState, list_mean, loss_of

_SMALLEST_STD = 1e-4
"""Added to a std, as TRL does."""


def advantages(scores: Tensor, mask: Tensor, scale: str, scores_std: float | None = None) -> Tensor:
    """[G, K]: score less the mean of its group, divided as `scale` says; 0 beside `mask`.

    "group": by the std of the group; "batch": by `scores_std`, or the std of all of `scores`; "none": by 1. A std is
    that of a sample (n - 1).
    """
    centred = (scores - list_mean(scores, mask)[:, None]) * mask
    match scale:
        case "group":
            std = (centred.square().sum(1) / (mask.sum(1) - 1).clamp_min(1)).sqrt()[:, None]
            return centred / (std + _SMALLEST_STD)
        case "batch":
            return centred / ((scores[mask].std().item() if scores_std is None else scores_std) + _SMALLEST_STD)
        case _:
            return centred


def clipped_losses(ratios: Tensor, advantage: Tensor, low: float, high: float, delta: float | None) -> Tensor:
    """PPO's surrogate (arXiv 1707.06347 eq. 7), elementwise: -min(c A, clip(c, 1 - low, 1 + high) A).

    `delta` bounds the c of the first one.
    """
    bounded = ratios if delta is None else ratios.clamp(max=delta)
    return -torch.minimum(bounded * advantage, ratios.clamp(1 - low, 1 + high) * advantage)


def kl_to_reference(policy: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimator of KL(pi || pi_ref), elementwise: e^(log pi_ref - log pi) - (log pi_ref - log pi) - 1."""
    gap = reference - policy
    return torch.expm1(gap) - gap


def _old(logps: LossInput) -> Tensor:
    """[N]: in a round of one step the policy in training is still the one that the round found."""
    return logps.tokens.policy.detach() if logps.tokens.old is None else logps.tokens.old


def _ratios(logps: LossInput, block: GrpoLossBlock) -> Tensor:
    """[N]: pi / pi_old, of each token or the geometric mean over its completion."""
    gaps = logps.tokens.policy - _old(logps)
    if block.importance_sampling_level == "sequence":
        gaps = logps.spread(logps.summed(gaps) / logps.lengths)
    return gaps.exp()


def _sampler_weights(logps: LossInput, block: GrpoLossBlock) -> Tensor:
    """[N]: pi_old / pi_sampler within its bounds, without gradients."""
    if logps.tokens.sampler is None:
        raise ValueError("GRPO reads the log-probs that its completions were sampled with, and there are none")
    gaps = _old(logps) - logps.tokens.sampler
    if block.vllm_importance_sampling_mode.startswith("sequence"):
        gaps = logps.spread(logps.summed(gaps))
    weights = gaps.exp()
    low, high = block.vllm_importance_sampling_clip_min, block.vllm_importance_sampling_clip_max
    bounded = weights.clamp(min=low, max=high)
    return bounded if block.vllm_importance_sampling_mode.endswith("truncate") else weights * (weights == bounded)


def _token_advantages(logps: LossInput, block: GrpoLossBlock, state: LossState) -> Tensor:
    return logps.spread(advantages(logps.scores, logps.mask, block.scale_rewards, state.scores_std))


def _token_losses(logps: LossInput, block: GrpoLossBlock, state: LossState) -> Tensor:
    """[N]."""
    ratios, advantage = _ratios(logps, block), _token_advantages(logps, block, state)
    if block.loss_type == "cispo":
        losses = -ratios.detach().clamp(max=block.clip_high) * advantage * logps.tokens.policy
    else:
        losses = clipped_losses(ratios, advantage, block.epsilon, block.clip_high, block.delta)
    if block.vllm_importance_sampling_correction:
        losses = losses * _sampler_weights(logps, block)
    return losses + block.beta * _token_kl(logps, block) if block.beta else losses


def _token_kl(logps: LossInput, block: GrpoLossBlock) -> Tensor:
    if logps.tokens.reference is None:
        raise ValueError("GRPO with a beta reads the reference token by token, and there is none")
    kl = kl_to_reference(logps.tokens.policy, logps.tokens.reference)
    return kl * _ratios(logps, block) if block.use_bias_correction_kl else kl


def _losses(logps: LossInput, block: GrpoLossBlock, state: LossState) -> Tensor:
    """[G], whose mean over the step is the step's loss."""
    losses = _token_losses(logps, block, state)
    match block.loss_type:
        case "grpo":
            return _mean(logps, state, losses, "sequence")
        case "dr_grpo":
            if state.max_completion_tokens is None:
                raise ValueError("dr_grpo divides by the longest completion that is sampled, which is not known")
            return logps.summed(losses).sum(1) / (_mean_candidates(logps, state) * state.max_completion_tokens)
        case _:
            return _mean(logps, state, losses)


def _mean_candidates(logps: LossInput, state: LossState) -> float:
    return logps.mask.sum(1).double().mean().item() if state.mean_candidates is None else state.mean_candidates


def _mean_tokens(logps: LossInput, state: LossState) -> float:
    return len(logps.tokens.policy) / len(logps.mask) if state.mean_tokens is None else state.mean_tokens


def _mean(logps: LossInput, state: LossState, values: Tensor, level: str = "token") -> Tensor:
    """[G]: its mean over the step is that of `values` [N] over all tokens, or over the completions that share them."""
    sums = logps.summed(values.to(logps.scores.dtype))
    if level == "sequence":
        return (sums / logps.lengths).sum(1) / _mean_candidates(logps, state)
    return sums.sum(1) / _mean_tokens(logps, state)


def _metrics(logps: LossInput, block: GrpoLossBlock, state: LossState) -> dict[str, Tensor]:
    ratios, advantage = _ratios(logps, block).detach(), _token_advantages(logps, block, state)
    level, found = block.importance_sampling_level, {"reward": list_mean(logps.scores, logps.mask)}
    if block.loss_type == "cispo":
        found["cispo_clip_ratio"] = _mean(logps, state, (ratios > block.clip_high) & (advantage > 0))
    else:
        low = (ratios < 1 - block.epsilon) & (advantage < 0)
        high = (ratios > 1 + block.clip_high) & (advantage > 0)
        for name, clipped in {"low": low, "high": high, "region": low | high}.items():
            found[f"clip_ratio/{name}_mean"] = _mean(logps, state, clipped, level)
    if block.vllm_importance_sampling_correction and logps.tokens.sampler is not None:
        gaps = (_old(logps) - logps.tokens.sampler).abs()
        found["sampling/sampling_logp_difference/mean"] = _mean(logps, state, gaps)
        of_sampler = block.vllm_importance_sampling_mode.split("_")[0]
        weights = _sampler_weights(logps, block)
        found["sampling/importance_sampling_ratio/mean"] = _mean(logps, state, weights, of_sampler)
    return found | ({"kl": _mean(logps, state, _token_kl(logps, block))} if block.beta else {})


def _log_ratios(logps: LossInput, block: GrpoLossBlock) -> Tensor:
    """[G, K]: log pi - log pi_old of whole completions, which has no beta."""
    return logps.policy - logps.summed(_old(logps))


LOSSES = loss_of(GrpoLossBlock, _losses, rewards=_log_ratios, metrics=_metrics)
