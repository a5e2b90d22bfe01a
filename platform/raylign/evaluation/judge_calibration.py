"""A scorer made a calibrated judge of pairs by what people say: Platt scaling and a band of ties, measured apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raylign.evaluation.agreement import Interval, cohen_kappa, share_interval

LEAST = 8
"""Answered pairs that each share needs."""
_LARGEST = 1e6
Values = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class CalibratedJudge:
    """P(the first answer is better) = 1 / (1 + exp(-slope d)) of a difference of scores d; a tie within `band` of 1/2.

    Platt scaling (Platt 1999) without its intercept: which of two answers stands first means nothing.
    """

    slope: float
    band: float

    def probability(self, difference: float) -> float:
        """0..1."""
        return 0.5 * (1 + math.tanh(0.5 * self.slope * difference))

    def share(self, difference: float) -> float:
        """What the first answer takes of the win: its probability, and half of a tie."""
        return 0.5 if self.verdict(difference) == "tie" else self.probability(difference)

    def verdict(self, difference: float) -> str:
        """`first`, `second` or `tie`."""
        return _verdict(self.probability(difference), self.band)


@dataclass(frozen=True, slots=True)
class Measured:
    """A calibrated judge against answers that it was not made of. `raw` is the scorer as it is: the larger score wins.

    `agreement` and `raw_agreement` are shares of the same verdict; `brier` is the mean square of probability less what
    people say, `coin_brier` the same of 1/2.
    """

    judge: CalibratedJudge
    made_of: int
    agreement: Interval
    raw_agreement: Interval
    kappa: Interval | None
    brier: float
    coin_brier: float


def calibrate(differences: Sequence[float], shares: Sequence[float]) -> CalibratedJudge:
    """Fit the judge to pairs: their score differences, and the share 0..1 that people give to the first answer.

    Targets are drawn in as Platt does, to (n + 1) / (n + 2) and 1 / (n + 2) of n pairs, so that scores that never err
    have a finite slope. The band is the one with the most verdicts as people's.
    """
    scale = float(np.max(np.abs(differences))) or 1.0
    d, count = np.asarray(differences, dtype=np.float64) / scale, len(differences)
    low, high = 1 / (count + 2), (count + 1) / (count + 2)
    targets = low + np.asarray(shares, dtype=np.float64) * (high - low)
    slope = _root(d, targets)
    return CalibratedJudge(slope / scale, _band(_sigmoid(slope * d), [people(share) for share in shares]))


def _band(probabilities: Values, truth: Sequence[str]) -> float:
    """The smallest band with the most verdicts as people's: the `k` least sure ones are ties, for every k."""
    sure = np.abs(probabilities - 0.5)
    order = np.argsort(sure, kind="stable")
    tie = np.array([said == "tie" for said in truth])[order]
    sided = np.array([_verdict(float(p), 0.0) == said for p, said in zip(probabilities, truth, strict=True)])[order]
    inside = np.searchsorted(sure[order], bands := np.unique(np.append(sure, 0.0)), side="right")
    right = np.append(0, np.cumsum(tie))[inside] + sided.sum() - np.append(0, np.cumsum(sided))[inside]
    return float(bands[int(np.argmax(right))])


def measure(
    judge: CalibratedJudge, made_of: int, differences: Sequence[float], shares: Sequence[float]
) -> Measured | None:
    """How the judge does on answers that it was not made of; None without any."""
    truth = [people(share) for share in shares]
    verdicts = [judge.verdict(difference) for difference in differences]
    raw = [raw_verdict(difference) for difference in differences]
    agreement = share_interval(sum(a == b for a, b in zip(verdicts, truth, strict=True)), len(truth))
    raw_agreement = share_interval(sum(a == b for a, b in zip(raw, truth, strict=True)), len(truth))
    if agreement is None or raw_agreement is None:
        return None
    errors = [judge.probability(d) - share for d, share in zip(differences, shares, strict=True)]
    return Measured(
        judge,
        made_of,
        agreement,
        raw_agreement,
        cohen_kappa(verdicts, truth),
        math.fsum(error**2 for error in errors) / len(errors),
        math.fsum((0.5 - share) ** 2 for share in shares) / len(errors),
    )


def people(share: float) -> str:
    """The verdict of people who give `share` of a pair to its first answer."""
    return "tie" if share == 0.5 else "first" if share > 0.5 else "second"


def raw_verdict(difference: float) -> str:
    """That of a scorer as it is."""
    return "tie" if difference == 0 else "first" if difference > 0 else "second"


def _verdict(probability: float, band: float) -> str:
    if abs(probability - 0.5) <= band:
        return "tie"
    return "first" if probability > 0.5 else "second"


def _sigmoid(values: Values) -> Values:
    return 0.5 * (1 + np.tanh(0.5 * values))


def _root(d: Values, targets: Values) -> float:
    """The slope at which the log-likelihood of `targets` is largest: it is concave, so its derivative has one root."""
    from scipy.optimize import brentq  # noqa: PLC0415 - takes seconds to load, for commands that calibrate nothing too

    def derivative(slope: float) -> float:
        return float(((targets - _sigmoid(slope * d)) * d).sum())

    if derivative(0.0) == 0:
        return 0.0
    bound = math.copysign(1.0, derivative(0.0))
    while derivative(bound) * bound > 0:
        if abs(bound) > _LARGEST:
            return bound
        bound *= 2
    return float(brentq(derivative, min(0.0, bound), max(0.0, bound), xtol=1e-10))
