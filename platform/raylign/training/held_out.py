"""What held-out preferences say of a policy or a reward model."""

from collections.abc import Mapping
from dataclasses import dataclass


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
