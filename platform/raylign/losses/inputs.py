"""What losses read and return, and what a loss is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogps:
    """Log-probabilities (nats) of the N completion tokens of a micro-batch. Made by the trainer, read by losses.

    Every tensor is fp32 [N] but `owners`. Without gradients where nothing else is said.
    """

    policy: Tensor
    """Under the policy in training, with gradients."""
    owners: Tensor
    """[N] int64: the place g K + k in [G, K] of the candidate that the token belongs to."""
    entropies: Tensor
    """Entropy of the policy's distribution over the vocabulary at the token; with gradients."""
    certainty: Tensor
    """log p(y_t) - log sum_v p(v)^2 under the policy."""
    weights: Tensor | None = None
    """Scale of each token in the sums over a candidate (`ld_weights`); None is 1."""
    sampler: Tensor | None = None
    """Under the policy that sampled the token, as the generator told it (temperature 1); None for answers that nobody
    sampled."""
    old: Tensor | None = None
    """Under the policy as the round found it, by the trainer's own forward pass: TRL's `old_per_token_logps`. There for
    losses that ask (`needs_samples`); None in a round of one step, where it is the policy itself."""
    reference: Tensor | None = None
    """Under the reference; there for losses that ask (`needs_reference_tokens`)."""

    def select(self, kept: Tensor, owners: Tensor) -> "TokenLogps":
        """The tokens where `kept` [N] is True; their owners are `owners`, [N] too."""

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[kept]

        return TokenLogps(
            self.policy[kept],
            owners[kept],
            self.entropies[kept],
            self.certainty[kept],
            some(self.weights),
            some(self.sampler),
            some(self.old),
            some(self.reference),
        )


@dataclass(frozen=True)
class LossInput:
    """The candidates of G preferences, best first, up to K each. Made by the trainer, read by losses.

    Groups of fewer than K candidates are filled at the end; a group without any real candidate is a filler as a whole
    and gets loss 0. Values of fillers are never read. A pair is K = 2. Sums are over completion tokens, in nats.
    """

    tokens: TokenLogps
    reference: Tensor
    """[G, K] fp32: summed log-probs under the reference, without gradients; zeros when there is no reference."""
    lengths: Tensor
    """[G, K]: completion tokens, at least 1."""
    scores: Tensor
    """[G, K] fp32: higher is better, equal is a tie. Ranked data without scores gets K-1, ..., 0."""
    mask: Tensor
    """[G, K] bool: True is a real candidate."""
    from_reference: Tensor
    """[G, K] bool: True is a sample of the reference."""
    kl_logratios: Tensor
    """[G] fp32: log pi - log pi_ref of the preferences' KL samples, with gradients; zeros when no loss asks for it."""
    has_fillers: bool = True
    """Whether a group may be without any real candidate. The trainer says no: a GPU is not asked for its mask."""

    @cached_property
    def policy(self) -> Tensor:
        """[G, K]: summed log-probs under the policy, with gradients."""
        tokens = self.tokens
        return self.summed(tokens.policy if tokens.weights is None else tokens.policy * tokens.weights)

    @cached_property
    def entropies(self) -> Tensor:
        """[G, K]: mean token entropy, with gradients."""
        return self.summed(self.tokens.entropies) / self.lengths

    @cached_property
    def certainty(self) -> Tensor:
        """[G, K]: mean of the tokens' certainty."""
        return self.summed(self.tokens.certainty) / self.lengths

    def summed(self, values: Tensor) -> Tensor:
        """[N] -> [G, K]: the sum over each candidate's tokens."""
        zeros = values.new_zeros(self.mask.numel())
        return zeros.index_add(0, self.tokens.owners, values).view(self.mask.shape)

    def spread(self, values: Tensor) -> Tensor:
        """[G, K] -> [N]: each token gets its candidate's value."""
        return values.flatten()[self.tokens.owners]


@dataclass(frozen=True, slots=True)
class LossState:
    """What a loss must know beyond its micro-batch. Made by the trainer, constant during an optimizer step."""

    kl: float = 0.0
    """KTO's reference point: estimate of KL(pi || pi_ref) of this step, nats per completion."""
    reward_shift: float = 0.0
    """BCO's shift: running mean of the implicit rewards over the steps before, against the present reference."""
    mean_chosen_tokens: float | None = None
    """Mean length of the best candidates over the whole step, all ranks; None takes the micro-batch's own mean."""
    mean_candidates: float | None = None
    """Candidates of a group, mean over the whole step; None takes the micro-batch's own mean."""
    mean_tokens: float | None = None
    """Completion tokens of a group, mean over the whole step; None takes the micro-batch's own mean."""
    scores_std: float | None = None
    """Standard deviation (of a sample) of all scores of the round; None takes the micro-batch's own."""
    max_completion_tokens: int | None = None
    """Where sampling stops, `sampling.max_new_tokens`; None where nothing is sampled."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Per preference, [G] each. `losses` carries gradients; all else is detached.

    The implicit rewards of the best and the worst candidate are TRL's `rewards/chosen` and `rewards/rejected`;
    `metrics` holds what the loss has to log besides, under TRL's names.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


def real_groups(logps: LossInput) -> tuple[LossInput, Callable[[Tensor], Tensor]]:
    """The groups with a real candidate, with harmless values in the place of fillers.

    The function puts a value of each of them back among all groups, where the others get 0.
    """
    if not logps.has_fillers:
        return _harmless(logps), lambda values: values
    real, groups, size = logps.mask.any(1), *logps.mask.shape
    group, rank = logps.tokens.owners // size, logps.tokens.owners % size
    some = LossInput(
        tokens=logps.tokens.select(real[group], (real.cumsum(0) - 1)[group] * size + rank),
        reference=logps.reference[real],
        lengths=logps.lengths[real],
        scores=logps.scores[real],
        mask=logps.mask[real],
        from_reference=logps.from_reference[real],
        kl_logratios=logps.kl_logratios[real],
        has_fillers=False,
    )
    return _harmless(some), lambda values: values.new_zeros(groups).masked_scatter(real, values)


def _harmless(logps: LossInput) -> LossInput:
    filler = ~logps.mask
    return replace(
        logps,
        reference=logps.reference.masked_fill(filler, 0.0),
        lengths=logps.lengths.masked_fill(filler, 1),
        scores=logps.scores.masked_fill(filler, 0.0),
        from_reference=logps.from_reference.masked_fill(filler, False),
    )


def ends(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[G, K] -> the values [G] of the best and of the worst real candidate."""
    last = mask.sum(1, keepdim=True) - 1
    return values[:, 0], values.gather(1, last).squeeze(1)


def list_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[G, K] -> mean [G] over the real candidates."""
    return (values * mask).sum(1) / mask.sum(1)


def difference(values: Tensor, mask: Tensor) -> Tensor:
    """[G, K] -> [G]: the value of the best real candidate less that of the worst."""
    best, worst = ends(values, mask)
    return best - worst


def nll(logps: LossInput, state: LossState) -> Tensor:
    """[G]: -log pi(w) / mean |w|: its mean over the step is the step's token mean, -sum log pi(w) / sum |w|."""
    lengths = logps.lengths[:, 0]
    tokens = lengths.double().mean() if state.mean_chosen_tokens is None else state.mean_chosen_tokens
    return -logps.policy[:, 0] / tokens


def implicit_rewards(logps: LossInput, block: Any) -> Tensor:
    """[G, K]: r = beta (log pi - log pi_ref), what TRL logs as rewards."""
    rewards: Tensor = block.beta * (logps.policy - logps.reference)
    return rewards


B = TypeVar("B")
Losses = Callable[[LossInput, B, LossState], Tensor]
"""From what a loss reads, its block of the config and the state to the loss [G] of each preference."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss, and what it has to log: the rewards [G, K] of its candidates, and metrics [G] under TRL's names."""

    losses: Losses[Any]
    rewards: Callable[[LossInput, Any], Tensor] = implicit_rewards
    metrics: Callable[[LossInput, Any, LossState], Mapping[str, Tensor]] = lambda logps, block, state: {}


Table = dict[type[Any], Loss]
"""By block: the loss that it configures. Each family of losses has one, beside its equations."""


def loss_of(
    block: type[B],
    losses: Losses[B],
    *,
    rewards: Callable[[LossInput, B], Tensor] = implicit_rewards,
    metrics: Callable[[LossInput, B, LossState], Mapping[str, Tensor]] = lambda logps, block, state: {},
) -> Table:
    """The table of one loss; what it is made of reads the block it stands for."""
    return {block: Loss(losses, rewards, metrics)}


def table(*parts: Table) -> Table:
    """One table of several."""
    return {block: loss for part in parts for block, loss in part.items()}
