"""Preferences as one forward pass, and its scores as the [G, K] tensors that losses read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from raylign.losses import CandidateLogps, ld_weights
from raylign.records import Preference
from raylign.training.logprobs import CompletionScores
from raylign.training.sequences import Completions, Layout, TokenBatch, token_batch, token_cost


@dataclass(frozen=True, slots=True)
class PreferenceBatch:
    """G preferences of up to K candidates. Made by `preference_batch`, read by the trainer.

    `tokens` holds the candidates group by group, best first; `places` [C] is the flat place of each in [G, K].
    `reference`, `scores` and `lengths` (in tokens, at least 1) [G, K] are fp32, `mask` [G, K] True on real candidates,
    `from_reference` [G, K] on samples of the reference.
    `weights` [G] fp32 multiply the losses: a real preference's own weight (above 0), 0 for a filler. `token_weights`
    [N] scale tokens, 1 when None.
    `num_tokens` counts prompts once per candidate, as TRL does, and fillers not at all.
    """

    tokens: TokenBatch
    places: Tensor
    reference: Tensor
    lengths: Tensor
    scores: Tensor
    mask: Tensor
    from_reference: Tensor
    weights: Tensor
    token_weights: Tensor | None
    num_tokens: int


def completions_of(preference: Preference) -> Completions:
    """The prompt and every candidate, best first."""
    return Completions(preference.prompt.token_ids, [candidate.token_ids for candidate in preference.candidates])


def preference_batch(
    preferences: Sequence[Preference],
    weights: Sequence[float],
    layout: Layout,
    pad_id: int,
    tail_weight: float = 1.0,
    reference_version: int | None = None,
) -> PreferenceBatch:
    """`weights` are 1 for a real preference, 0 for a filler. `tail_weight` is the loss's; 1 weighs all tokens alike.

    The reference is policy version `reference_version`, None where nobody samples it.
    """
    size = max(len(preference.candidates) for preference in preferences)
    groups = [completions_of(preference) for preference in preferences]
    return PreferenceBatch(
        tokens=token_batch(groups, layout, pad_id),
        places=torch.tensor([g * size + k for g, p in enumerate(preferences) for k in range(len(p.candidates))]),
        reference=_grid([p.reference_logps for p in preferences], size),
        lengths=_grid([[max(1, len(c.token_ids)) for c in p.candidates] for p in preferences], size, 1.0),
        scores=_grid([p.scores for p in preferences], size),
        mask=_grid([[1.0] * len(p.candidates) for p in preferences], size).bool(),
        from_reference=_grid(
            [[c.policy_version == reference_version for c in p.candidates] for p in preferences], size
        ).bool(),
        weights=torch.tensor(
            [weight * fmean(p.weights) for weight, p in zip(weights, preferences, strict=True)], dtype=torch.float32
        ),
        token_weights=None if tail_weight == 1.0 else torch.cat([_tail_weights(p, tail_weight) for p in preferences]),
        num_tokens=sum(token_cost(g, "packed") for g, weight in zip(groups, weights, strict=True) if weight),
    )


def sampler_logps(preference: Preference, tail_weight: float = 1.0) -> tuple[float, ...]:
    """Summed log-probs (nats) of the candidates under the policy that sampled them."""
    weights = iter(_tail_weights(preference, tail_weight).tolist())
    return tuple(math.fsum(logp * next(weights) for logp in candidate.logprobs) for candidate in preference.candidates)


def _tail_weights(preference: Preference, tail_weight: float) -> Tensor:
    return ld_weights([len(candidate.token_ids) for candidate in preference.candidates], tail_weight)


def to_device(batch: PreferenceBatch, device: torch.device) -> PreferenceBatch:
    """The same batch on `device`."""
    names = ("places", "reference", "lengths", "scores", "mask", "from_reference", "weights")
    moved = {name: getattr(batch, name).to(device) for name in names}
    token_weights = None if batch.token_weights is None else batch.token_weights.to(device)
    return replace(batch, tokens=batch.tokens.to(device), token_weights=token_weights, **moved)


def candidate_logps(batch: PreferenceBatch, scores: CompletionScores) -> CandidateLogps:
    """What losses read, from a forward pass over `batch.tokens`."""
    tokens = scores.tokens
    lengths = batch.lengths.flatten()[batch.places]
    certainty = (tokens.logps.detach() - tokens.log_collisions).detach()
    return CandidateLogps(
        policy=placed(batch, scores.logps),
        reference=batch.reference,
        lengths=batch.lengths,
        scores=batch.scores,
        mask=batch.mask,
        entropies=placed(batch, _per_completion(tokens.entropies, scores) / lengths),
        certainty=placed(batch, _per_completion(certainty, scores) / lengths),
        from_reference=batch.from_reference,
    )


def _per_completion(values: Tensor, scores: CompletionScores) -> Tensor:
    return torch.zeros_like(scores.logps.detach()).index_add(0, scores.owners, values)


def placed(batch: PreferenceBatch, values: Tensor) -> Tensor:
    """Values [C] of the candidates as [G, K], 0 where there is none."""
    grid = torch.zeros(batch.mask.numel(), device=values.device, dtype=values.dtype)
    return grid.index_put((batch.places,), values).view(batch.mask.shape)


def _grid(rows: Sequence[Sequence[float]], size: int, filler: float = 0.0) -> Tensor:
    return torch.tensor([[*row, *[filler] * (size - len(row))] for row in rows], dtype=torch.float32)
