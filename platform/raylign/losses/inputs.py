"""What losses read and return, and what a loss is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor


@dataclass(frozen=True, slots=True)
class CandidateLogps:
    """Log-probabilities of the candidates of G preferences, best first. Made by the trainer, read by losses.

    Groups of two to K - 1 candidates are filled at the end; a group without any real candidate is a filler as a whole
    and gets loss 0. Values of fillers are never read. Sums are over completion tokens, in nats.
    """

    policy: Tensor
    """[G, K] fp32: summed log-probs under the policy, with gradients."""
    reference: Tensor
    """[G, K] fp32: the same under the reference, without gradients; zeros when there is no reference."""
    lengths: Tensor
    """[G, K]: completion tokens, at least 1."""
    scores: Tensor
    """[G, K] fp32: higher is better, equal is a tie. Ranked data without scores gets K-1, ..., 0."""
    mask: Tensor
    """[G, K] bool: True is a real candidate."""
    entropies: Tensor
    """[G, K]: mean token entropy; with gradients when the loss asks for them."""
    certainty: Tensor
    """[G, K] detached: mean over tokens of log p(y_t) - log sum_v p(v)^2."""
    from_reference: Tensor
    """[G, K] bool: True is a sample of the reference."""
    kl_logratios: Tensor
    """[G] fp32: log pi - log pi_ref of the preferences' KL samples, with gradients; zeros when no loss asks for it."""


@dataclass(frozen=True, slots=True)
class LossState:
    """What a loss must know beyond its micro-batch. Made by the trainer, constant during an optimizer step."""

    kl: float = 0.0
    """KTO's reference point: estimate of KL(pi || pi_ref) of this step, nats per completion."""
    reward_shift: float = 0.0
    """BCO's shift: running mean of the implicit rewards over the steps before, against the present reference."""
    mean_chosen_tokens: float | None = None
    """Mean length of the best candidates over the whole step, all ranks; None takes the micro-batch's own mean."""


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


def real_groups(logps: CandidateLogps, real: Tensor) -> CandidateLogps:
    """The groups where `real` [G] is True, with harmless values in the place of fillers."""
    mask = logps.mask[real]

    def filled(values: Tensor, filler: float) -> Tensor:
        return values[real].masked_fill(~mask, filler)

    return CandidateLogps(
        policy=filled(logps.policy, 0.0),
        reference=filled(logps.reference, 0.0),
        lengths=filled(logps.lengths, 1),
        scores=filled(logps.scores, 0.0),
        mask=mask,
        entropies=filled(logps.entropies, 0.0),
        certainty=filled(logps.certainty, 0.0),
        from_reference=filled(logps.from_reference, False),
        kl_logratios=logps.kl_logratios[real],
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


def nll(logps: CandidateLogps, state: LossState) -> Tensor:
    """[G]: -log pi(w) / mean |w|: its mean over the step is the step's token mean, -sum log pi(w) / sum |w|."""
    lengths = logps.lengths[:, 0]
    tokens = lengths.double().mean() if state.mean_chosen_tokens is None else state.mean_chosen_tokens
    return -logps.policy[:, 0] / tokens


def implicit_rewards(logps: CandidateLogps, block: Any) -> Tensor:
    """[G, K]: r = beta (log pi - log pi_ref), what TRL logs as rewards."""
    rewards: Tensor = block.beta * (logps.policy - logps.reference)
    return rewards


B = TypeVar("B")
Losses = Callable[[CandidateLogps, B, LossState], Tensor]
"""From what a loss reads, its block of the config and the state to the loss [G] of each preference."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss, and what it has to log: the rewards [G, K] of its candidates, and metrics [G] under TRL's names."""

    losses: Losses[Any]
    rewards: Callable[[CandidateLogps, Any], Tensor] = implicit_rewards
    metrics: Callable[[CandidateLogps, Any, LossState], Mapping[str, Tensor]] = lambda logps, block, state: {}


Table = dict[type[Any], Loss]
"""By block: the loss that it configures. Each family of losses has one, beside its equations."""


def loss_of(
    block: type[B],
    losses: Losses[B],
    *,
    rewards: Callable[[CandidateLogps, B], Tensor] = implicit_rewards,
    metrics: Callable[[CandidateLogps, B, LossState], Mapping[str, Tensor]] = lambda logps, block, state: {},
) -> Table:
    """The table of one loss; what it is made of reads the block it stands for."""
    return {block: Loss(losses, rewards, metrics)}


def table(*parts: Table) -> Table:
    """One table of several."""
    return {block: loss for part in parts for block, loss in part.items()}
