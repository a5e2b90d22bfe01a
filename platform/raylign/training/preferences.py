"""Preferences as one forward pass, and its scores as the [G, K] tensors that losses read."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raylign.config.losses import TrainerLoss
from raylign.errors import TrainerError
from raylign.losses import LossInput, LossState, TokenLogps, ld_weights
from raylign.records import Completions, Preference
from raylign.training.kernels.head import TokenScores
from raylign.training.logprobs import CompletionScores
from raylign.training.sequences import Layout, TokenBatch, cut, on_device, token_batch, token_cost

_NOTHING = Completions((0,), ((),))
_FILL = "fill them by with_reference"
_SAME_BATCH = (
    "with_reference leaves them out where a round takes one step: finish this round with the batch size and epochs "
    "that it began with"
)


class KlPlaces(NamedTuple):
    """Where candidates and KL samples stand in a pass over both, int64; known from the lengths, so no mask is asked.

    `samples` [G] and `candidates` [C] are their numbers among the completions of the pass, `tokens` [N] the numbers of
    the candidates' tokens, `owners` [N] the candidate of each.
    """

    samples: Tensor
    candidates: Tensor
    tokens: Tensor
    owners: Tensor

    def to(self, device: torch.device) -> "KlPlaces":
        return KlPlaces(*(on_device(part, device) for part in self))


@dataclass(frozen=True, slots=True)
class PreferenceBatch:
    """G preferences of up to K candidates. Made by `preference_batch`, read by the trainer.

    `tokens` holds the candidates group by group, best first; `places` [C] is the flat place of each in [G, K].
    `reference`, `scores` and `lengths` (in tokens, at least 1) [G, K] are fp32, `mask` [G, K] True on real candidates,
    `from_reference` [G, K] on samples of the reference. `sizes` are the candidates of each preference. `kl_samples`
    says which completions of `tokens` are KL samples (one of each preference, behind its candidates), None where they
    are left out; `kl_reference` [G] fp32 are their reference log-probs.
    `weights` [G] fp32 multiply the losses: a real preference's own weight (above 0), 0 for a filler. `token_weights`
    [N] scale tokens, 1 when None. `sampler`, `old` and `reference_tokens` [N] are those of `raylign.losses.TokenLogps`.
    `num_tokens` counts prompts once per candidate, as TRL does, fillers and KL samples not at all. `pieces` are the
    same completions for several forward passes, those of `raylign.training.pieces`; () where one takes them all.
    """

    tokens: TokenBatch
    places: Tensor
    reference: Tensor
    lengths: Tensor
    scores: Tensor
    mask: Tensor
    from_reference: Tensor
    sizes: tuple[int, ...]
    kl_samples: KlPlaces | None
    kl_reference: Tensor
    weights: Tensor
    token_weights: Tensor | None
    sampler: Tensor | None
    old: Tensor | None
    reference_tokens: Tensor | None
    num_tokens: int
    pieces: tuple[TokenBatch, ...] = ()

    @property
    def completions(self) -> int:
        """C: candidates and KL samples."""
        return len(self.places) + (0 if self.kl_samples is None else len(self.kl_samples.samples))


def completions_of(preference: Preference) -> Completions:
    """The prompt and every candidate, best first."""
    return Completions(preference.prompt.token_ids, [candidate.token_ids for candidate in preference.candidates])


def kl_completions(preference: Preference) -> Completions:
    """The KL sample behind its prompt. Every preference of a loss that asks for one has it (`require_logps`)."""
    sample = preference.kl_sample
    assert sample is not None
    return Completions(sample.prompt_token_ids, (sample.token_ids,))


def forward_groups(preference: Preference, with_kl: bool) -> list[Completions]:
    """What one forward pass runs: the candidates and, `with_kl`, the KL sample; their prompt once if it is the same."""
    own = completions_of(preference)
    if not with_kl:
        return [own]
    kl = kl_completions(preference)
    return [Completions(own.prompt, [*own.completions, *kl.completions])] if kl.prompt == own.prompt else [own, kl]


def pass_cost(preference: Preference, layout: Layout, loss: TrainerLoss) -> int:
    """Tokens of the preference in the largest pass that `loss` makes over it; see `token_cost`."""
    cost = sum(token_cost(group, layout) for group in forward_groups(preference, loss.needs_kl_gradient))
    return max(cost, token_cost(kl_completions(preference), layout)) if loss.needs_kl_baseline else cost


def passes_of(preference: Preference, layout: Layout, max_tokens: int, loss: TrainerLoss) -> int:
    """Forward passes that the preference takes by itself, of at most `max_tokens` tokens each."""
    return len(cut(forward_groups(preference, loss.needs_kl_gradient), layout, max_tokens))


def in_passes(
    batch: PreferenceBatch, preferences: Sequence[Preference], layout: Layout, pad_id: int, max_tokens: int, passes: int
) -> PreferenceBatch:
    """`batch`, made of `preferences`, in `passes` pieces of at most `max_tokens` tokens, the last of them fillers.

    A filler is a token without a completion. One pass leaves `batch` as it is.
    """
    if passes == 1:
        return batch
    with_kl = batch.kl_samples is not None
    pieces = cut([group for p in preferences for group in forward_groups(p, with_kl)], layout, max_tokens)
    pieces += [[_NOTHING]] * (passes - len(pieces))
    return replace(batch, pieces=tuple(token_batch(piece, layout, pad_id) for piece in pieces))


def preference_batch(
    preferences: Sequence[Preference],
    weights: Sequence[float],
    layout: Layout,
    pad_id: int,
    tail_weight: float = 1.0,
    reference_version: int | None = None,
    with_kl: bool = False,
) -> PreferenceBatch:
    """`weights` are 1 for a real preference, 0 for a filler. `tail_weight` is the loss's; 1 weighs all tokens alike.

    The reference is policy version `reference_version`, None where nobody samples it. `with_kl` puts the KL samples
    behind the candidates of their preferences.
    """
    size = max(len(preference.candidates) for preference in preferences)
    groups = [completions_of(preference) for preference in preferences]
    return PreferenceBatch(
        tokens=token_batch([group for p in preferences for group in forward_groups(p, with_kl)], layout, pad_id),
        places=torch.tensor([g * size + k for g, p in enumerate(preferences) for k in range(len(p.candidates))]),
        reference=_grid([p.reference_logps for p in preferences], size),
        lengths=_grid([[max(1, len(c.token_ids)) for c in p.candidates] for p in preferences], size, 1.0),
        scores=_grid([p.scores for p in preferences], size),
        mask=_grid([[1.0] * len(p.candidates) for p in preferences], size).bool(),
        from_reference=_grid(
            [[c.policy_version == reference_version for c in p.candidates] for p in preferences], size
        ).bool(),
        sizes=tuple(len(p.candidates) for p in preferences),
        kl_samples=_kl_places(preferences) if with_kl else None,
        kl_reference=kl_reference_logps(preferences),
        weights=torch.tensor(
            [weight * fmean(p.weights) for weight, p in zip(weights, preferences, strict=True)], dtype=torch.float32
        ),
        token_weights=None if tail_weight == 1.0 else torch.cat([_tail_weights(p, tail_weight) for p in preferences]),
        sampler=_by_token([[c.logprobs for c in p.candidates] for p in preferences], groups),
        old=_by_token([p.old_logprobs for p in preferences], groups),
        reference_tokens=_by_token([p.reference_logprobs for p in preferences], groups),
        num_tokens=sum(token_cost(g, "packed") for g, weight in zip(groups, weights, strict=True) if weight),
    )


def _kl_places(preferences: Sequence[Preference]) -> KlPlaces:
    samples: list[int] = []
    candidates: list[int] = []
    tokens: list[int] = []
    owners: list[int] = []
    start = 0
    for preference in preferences:
        for completion in completions_of(preference).completions:
            owners += [len(candidates)] * len(completion)
            candidates.append(len(candidates) + len(samples))
            tokens += range(start, start + len(completion))
            start += len(completion)
        samples.append(len(candidates) + len(samples))
        start += sum(map(len, kl_completions(preference).completions))
    return KlPlaces(*(torch.tensor(places, dtype=torch.int64) for places in (samples, candidates, tokens, owners)))


def _by_token(values: Sequence[Sequence[Sequence[float]]], groups: Sequence[Completions]) -> Tensor | None:
    """[N] fp32 from values by preference, candidate and token; None unless there is one for every token."""
    found = [[len(of_candidate) for of_candidate in of_group] for of_group in values]
    if found != [[len(completion) for completion in group.completions] for group in groups]:
        return None
    return torch.tensor([value for of_group in values for one in of_group for value in one], dtype=torch.float32)


def token_values(values: Tensor, preferences: Sequence[Preference]) -> list[tuple[tuple[float, ...], ...]]:
    """[N] values of the candidates' tokens by preference, candidate and token."""
    flat = iter(values.tolist())
    return [tuple(tuple(islice(flat, len(c.token_ids))) for c in p.candidates) for p in preferences]


def kl_reference_logps(preferences: Sequence[Preference]) -> Tensor:
    """[G] fp32: reference log-probs of the KL samples, 0 where there is none yet."""
    samples = [preference.kl_sample for preference in preferences]
    return torch.tensor(
        [0.0 if sample is None else sample.reference_logp or 0.0 for sample in samples], dtype=torch.float32
    )


def with_means(
    state: LossState, step: Sequence[Preference], whole_round: Sequence[Preference], longest: int | None
) -> LossState:
    """`state` with what a loss must know of a whole step and of its round, over all ranks; no tokens count as 1.

    `longest` is where sampling stops, in tokens.
    """
    lengths = [[len(candidate.token_ids) for candidate in preference.candidates] for preference in step]
    scores = np.array([score for preference in whole_round for score in preference.scores])
    return replace(
        state,
        mean_chosen_tokens=max(1, sum(of_group[0] for of_group in lengths)) / len(step),
        mean_candidates=fmean(map(len, lengths)),
        mean_tokens=max(1, sum(map(sum, lengths))) / len(step),
        scores_std=float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
        max_completion_tokens=longest,
    )


def _tail_weights(preference: Preference, tail_weight: float) -> Tensor:
    return ld_weights([len(candidate.token_ids) for candidate in preference.candidates], tail_weight)


def to_device(batch: PreferenceBatch, device: torch.device) -> PreferenceBatch:
    """The same batch on `device`."""
    values = ((field.name, getattr(batch, field.name)) for field in fields(batch))
    moved: dict[str, Any] = {}
    for name, value in values:
        if isinstance(value, TokenBatch | KlPlaces):
            moved[name] = value.to(device)
        elif isinstance(value, Tensor):
            moved[name] = on_device(value, device)
    return replace(batch, **moved, pieces=tuple(piece.to(device) for piece in batch.pieces))


def without_kl_samples(batch: PreferenceBatch, scores: CompletionScores) -> tuple[CompletionScores, Tensor]:
    """The scores of the candidates alone, and the log-ratios [G] of the KL samples: zeros where they are left out."""
    places = batch.kl_samples
    if places is None:
        return scores, torch.zeros_like(batch.kl_reference)
    tokens = TokenScores(*(one[places.tokens] for one in scores.tokens))
    of_candidates = CompletionScores(scores.logps[places.candidates], tokens, places.owners)
    return of_candidates, scores.logps[places.samples] - batch.kl_reference


def loss_input(batch: PreferenceBatch, scores: CompletionScores, kl_logratios: Tensor | None = None) -> LossInput:
    """What losses read, from the two of `without_kl_samples`; zeros are the log-ratios of KL samples that are None."""
    tokens = scores.tokens
    return LossInput(
        TokenLogps(
            policy=tokens.logps,
            owners=batch.places[scores.owners],
            entropies=tokens.entropies,
            certainty=(tokens.logps - tokens.log_collisions).detach(),
            weights=batch.token_weights,
            sampler=batch.sampler,
            old=batch.old,
            reference=batch.reference_tokens,
        ),
        reference=batch.reference,
        lengths=batch.lengths,
        scores=batch.scores,
        mask=batch.mask,
        from_reference=batch.from_reference,
        kl_logratios=torch.zeros_like(batch.kl_reference) if kl_logratios is None else kl_logratios,
        has_fillers=False,
    )


def placed(batch: PreferenceBatch, values: Tensor) -> Tensor:
    """Values [C] of the candidates as [G, K], 0 where there is none."""
    grid = torch.zeros(batch.mask.numel(), device=values.device, dtype=values.dtype)
    return grid.index_put((batch.places,), values).view(batch.mask.shape)


def _grid(rows: Sequence[Sequence[float]], size: int, filler: float = 0.0) -> Tensor:
    return torch.tensor([[*row, *[filler] * (size - len(row))] for row in rows], dtype=torch.float32)


def require_logps(preferences: Sequence[Preference], loss: TrainerLoss, steps: int = 1) -> None:
    """Raises TrainerError when `loss` reads log-probs that a preference or its KL sample does not have.

    The round takes `steps` optimizer steps.
    """
    for index, preference in enumerate(preferences):
        if loss.needs_reference:
            _require_reference(index, preference, loss)
        if loss.needs_reference_tokens:
            _require_by_token(index, preference, loss, preference.reference_logprobs, "the reference's", _FILL)
        if loss.needs_samples:
            sampled = [candidate.logprobs for candidate in preference.candidates]
            _require_by_token(index, preference, loss, sampled, "the sampler's", "train on samples of the policy")
        if loss.needs_samples and steps > 1:
            _require_by_token(
                index, preference, loss, preference.old_logprobs, "the round's first policy's", _SAME_BATCH
            )


def _require_by_token(
    index: int,
    preference: Preference,
    loss: TrainerLoss,
    found: Sequence[Sequence[float]],
    whose: str,
    cure: str,
) -> None:
    tokens = [len(candidate.token_ids) for candidate in preference.candidates]
    if [len(values) for values in found] != tokens:
        raise TrainerError(
            f"preference {index} (prompt {preference.prompt.id}) has {whose} log-probs for "
            f"{[len(values) for values in found]} of {tokens} tokens, and loss_type={loss.loss_type} reads them token "
            f"by token; {cure}"
        )


def _require_reference(index: int, preference: Preference, loss: TrainerLoss) -> None:
    sample = preference.kl_sample
    if loss.needs_kl_sample and (sample is None or sample.reference_logp is None):
        raise TrainerError(
            f"preference {index} (prompt {preference.prompt.id}) has no KL sample with a reference log-prob, and "
            f"loss_type={loss.loss_type} reads it; fill it by raylign.pairing.kl_samples and with_reference"
        )
    found, wanted = len(preference.reference_logps), len(preference.candidates)
    if found != wanted:
        raise TrainerError(
            f"preference {index} (prompt {preference.prompt.id}) has {found} reference log-probs for {wanted} "
            f"candidates, and loss_type={loss.loss_type} reads them; fill them by with_reference"
        )
