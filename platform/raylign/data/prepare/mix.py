"""Which pairs come out: exact shares of languages or sources, drawn by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from raylign.errors import DataError

SHARE_DENOMINATOR = 10**6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Allocation:
    """Pairs to take of each group, and a note where a group has too few for its share; else an empty note."""

    counts: Mapping[str, int]
    note: str


def allocate(available: Mapping[str, int], shares: Mapping[str, float], size: int | None, what: str) -> Allocation:
    """As many pairs as `shares` (relative, positive) and `available` allow, at most `size`, the shares kept exact.

    Rounding is by largest remainder, so that each count is within one of its share. `what` says what groups are.
    Raises DataError when a group has too few for even one draw.
    """
    parts = {name: Fraction(share).limit_denominator(SHARE_DENOMINATOR) for name, share in shares.items()}
    total = sum(parts.values())
    exact = {name: part / total for name, part in parts.items()}
    have = {name: available.get(name, 0) for name in exact}
    possible = {name: int(have[name] / share) for name, share in exact.items()}
    short = min(possible, key=lambda name: possible[name])
    if not possible[short]:
        found = ", ".join(f"{name} {count:,}" for name, count in sorted(available.items())) or "none"
        raise DataError(
            f"the mix wants {float(exact[short]):.3g} of its pairs from {what} {short} and {have[short]} are left "
            f"(pairs by {what}: {found}); add sources, change the shares, or set mix.type=none"
        )
    drawn = possible[short] if size is None else min(size, possible[short])
    return Allocation(_rounded(exact, drawn), _note(short, have[short], float(exact[short]), drawn, size, what))


def draw(keys: NDArray[np.uint64], rows: NDArray[np.intp], count: int, seed: int) -> NDArray[np.intp]:
    """`count` of `rows`: those whose key, scrambled with the seed, is lowest. What else is there changes nothing."""
    order = np.argsort(scrambled(keys[rows], seed), kind="stable")
    return np.sort(rows[order[:count]])


def scrambled(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """splitmix64 (Steele et al. 2014) of keys and seed: equal inputs, equal outputs, on every machine."""
    mixed = keys + np.uint64((seed + 1) * _GOLDEN & _MASK)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _rounded(exact: Mapping[str, Fraction], total: int) -> dict[str, int]:
    counts = {name: int(share * total) for name, share in exact.items()}
    by_remainder: Sequence[str] = sorted(exact, key=lambda name: (counts[name] - exact[name] * total, name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _note(short: str, have: int, share: float, drawn: int, size: int | None, what: str) -> str:
    if drawn == size or (size is None and share == 1):
        return ""
    if size is None:
        return f"{what} {short} sets the size: {have:,} pairs at a share of {share:.3g} allow {drawn:,} in all"
    return (
        f"mix.size={size} cannot be met: {what} {short} has {have:,} pairs, a share of {share:.3g} needs "
        f"{round(share * size):,}; {drawn:,} pairs came out with exact shares. Add {short} data, lower mix.size, or "
        "change the shares"
    )
