"""What held-out preferences say of a policy or a reward model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np

from raylign.config.offline import HeldOutBlock
from raylign.evaluation.generated import Values, mean_interval
from raylign.records import HeldOutEvaluation


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Made by the trainers' `evaluate`, read by recipes and reports.

    `metrics` are means over all preferences, under the names of training. The others are per preference, in the order
    that was given: `losses`, and the rewards of the best and the worst candidate (implicit ones of a policy, those of
    a reward model), which are one and the same for a demonstration of one candidate.
    """

    metrics: Mapping[str, float]
    losses: tuple[float, ...]
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]


Metric = Literal["rewards/accuracies", "loss"]


class Measured(Protocol):
    """What the trainer says of held-out rows; `losses`, `chosen` and `rejected` (rewards) are per row."""

    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def losses(self) -> Sequence[float]: ...
    @property
    def chosen(self) -> Sequence[float]: ...
    @property
    def rejected(self) -> Sequence[float]: ...


def held_out_evaluation(
    measured: Measured, metric: Metric, block: HeldOutBlock, seed: int, more: Mapping[str, float] = MappingProxyType({})
) -> HeldOutEvaluation:
    """Sum up held-out rows by `metric`: the share of pairs ranked rightly, or the mean loss per row.

    `more` are further metrics of the same rows.

    Equal rewards are half right: a policy that equals its reference ranks nothing, which is a coin's 1/2. The interval
    is the percentile bootstrap over rows, drawn with `seed`.
    """
    values = _accuracies(measured) if metric == "rewards/accuracies" else np.asarray(measured.losses)
    low, high = mean_interval(values, block, seed)
    value = float(values.mean())
    return HeldOutEvaluation(metric, value, low, high, len(values), {**measured.metrics, **more, metric: value})


def _accuracies(measured: Measured) -> Values:
    chosen, rejected = np.asarray(measured.chosen), np.asarray(measured.rejected)
    return np.where(chosen == rejected, 0.5, (chosen > rejected).astype(np.float64))
