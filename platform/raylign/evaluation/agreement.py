"""How well those who judge agree: a scorer with people, people with each other. Choices are labels without an order."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

_CONFIDENCE = 0.95
_NORMAL = 1.959963984540054
"""Quantile of the normal distribution for 95 %."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % interval; `count` is what it was measured on."""

    value: float
    low: float
    high: float
    count: int


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> Interval | None:
    """Cohen's kappa of two who judged the same items: 0 is chance, 1 agreement throughout.

    Its interval is of the asymptotic variance (Fleiss, Cohen and Everitt 1969). Where the two agree throughout
    that is 0: the exact lower bound of the share of agreement stands in for it. None where both always say one and the
    same, or where there is no item: chance explains everything then.
    """
    count = len(first)
    labels = {label: place for place, label in enumerate(dict.fromkeys((*first, *second)))}
    table = np.zeros((len(labels), len(labels)))
    for one, other in zip(first, second, strict=True):
        table[labels[one], labels[other]] += 1
    if len(labels) < 2:
        return None
    shares = table / count
    rows, columns = shares.sum(axis=1), shares.sum(axis=0)
    observed, chance = float(np.trace(shares)), float(rows @ columns)
    kappa = (observed - chance) / (1 - chance)
    if observed == 1:
        least = ((1 - _CONFIDENCE) / 2) ** (1 / count)
        return Interval(1.0, max(-1.0, (least - chance) / (1 - chance)), 1.0, count)
    both = columns[:, None] + rows[None, :]  # [i, j]: column of i and row of j
    diagonal = np.diag(shares) @ ((1 - chance) - (rows + columns) * (1 - observed)) ** 2
    apart = (1 - observed) ** 2 * ((shares * both**2).sum() - np.diag(shares) @ np.diag(both) ** 2)
    variance = (diagonal + apart - (observed * chance - 2 * chance + observed) ** 2) / (count * (1 - chance) ** 4)
    half = _NORMAL * math.sqrt(max(0.0, float(variance)))
    return Interval(kappa, max(-1.0, kappa - half), min(1.0, kappa + half), count)


def krippendorff_alpha(units: Sequence[Sequence[Hashable]], seed: int, samples: int = 1000) -> Interval | None:
    """Krippendorff's alpha for labels without an order (Krippendorff 2011): `units[u]` is what people say of item u.

    Items may have any number of answers; those with one say nothing and are left out. The interval is the percentile
    bootstrap over items, drawn with `seed`. None where no two answers can differ.
    """
    paired = [unit for unit in units if len(unit) > 1]
    labels = {label: place for place, label in enumerate(dict.fromkeys(label for unit in paired for label in unit))}
    if len(labels) < 2:
        return None
    counts = np.zeros((len(paired), len(labels)))
    for row, unit in enumerate(paired):
        for label, times in Counter(unit).items():
            counts[row, labels[label]] = times
    value = _alpha(counts)
    generator = np.random.default_rng(seed)
    drawn = [_alpha(counts[generator.integers(len(paired), size=len(paired))]) for _ in range(samples)]
    low, high = np.nanquantile(drawn, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Interval(value, float(low), float(high), len(paired))


def _alpha(counts: "np.ndarray[tuple[int, int], np.dtype[np.float64]]") -> float:
    """1 - observed / expected disagreement of `counts` [units, labels]; NaN where one label is all there is."""
    sizes = counts.sum(axis=1)
    apart = ((sizes**2 - (counts**2).sum(axis=1)) / (sizes - 1)).sum()
    totals, total = counts.sum(axis=0), sizes.sum()
    expected = (total**2 - (totals**2).sum()) / (total - 1)
    return float(1 - apart / expected) if expected else math.nan


def share_interval(successes: int, count: int) -> Interval | None:
    """A share with Wilson's interval (1927); None of nothing."""
    if count == 0:
        return None
    share, z = successes / count, _NORMAL**2
    centre = (share + z / (2 * count)) / (1 + z / count)
    half = _NORMAL / (1 + z / count) * math.sqrt(share * (1 - share) / count + z / (4 * count**2))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), count)
