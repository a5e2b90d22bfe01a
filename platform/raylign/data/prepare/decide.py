"""Which pairs come out: those that pass every filter, in exact shares of languages or sources, drawn by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from raylign.config.prepare import LanguageMixBlock, PlainMixBlock, PrepareConfig, SourceMixBlock
from raylign.data.prepare.accounts import Account, PairFate, total_fates
from raylign.data.prepare.collect import Collected
from raylign.data.prepare.duplicates import Keys, exact_duplicates, near_duplicates
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


Rows = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Decision:
    """`kept` says of each collected pair whether it comes out; `notes` are for people."""

    kept: Rows
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Groups:
    """What the mix has shares of: `labels` counts through `names`, `what` says what they are."""

    labels: NDArray[np.uint16]
    names: tuple[str, ...]
    shares: Mapping[str, float]
    what: str


def decide(collected: Collected, config: PrepareConfig, accounts: Sequence[Account]) -> Decision:
    """Drop duplicates, then draw the mix; the fate of every pair goes into the account of its source.

    Raises DataError when nothing is left, or nothing of a language or source that the mix wants.
    """
    keys, alive = collected.keys, np.ones(len(collected.keys), dtype=np.bool_)
    notes: list[str] = []

    def drop(rows: Rows, fate: PairFate) -> None:
        _mark(rows, fate, keys, accounts)
        alive[rows] = False

    if config.filters.exact_duplicates:
        drop(exact_duplicates(keys.key.view()), "exact_duplicate")
    near = config.filters.near_duplicates
    if near is not None and collected.signatures is not None:
        found = near_duplicates(collected.signatures, keys.example.view(), alive, near.jaccard)
        drop(found.rows, "near_duplicate")
        if found.unseen:
            notes.append(_unseen(found.unseen))
    groups = _groups(keys, config)
    wanted = [place for place, name in enumerate(groups.names) if name in groups.shares]
    drop(alive & ~np.isin(groups.labels, wanted), "other_language")
    kept, note = _drawn(groups, keys, alive, config, accounts)
    drop(alive & ~kept, "not_drawn")
    _mark(kept, "kept", keys, accounts)
    return Decision(kept, tuple([*notes, note] if note else notes))


def _groups(keys: Keys, config: PrepareConfig) -> _Groups:
    match config.mix:
        case LanguageMixBlock(shares=shares):
            return _Groups(keys.language.view(), tuple(keys.languages), shares, "language")
        case SourceMixBlock():
            weights = {source.name: source.weight for source in config.sources}
            return _Groups(keys.source.view(), tuple(weights), weights, "source")
        case PlainMixBlock():
            return _Groups(np.zeros(len(keys), dtype=np.uint16), ("all",), {"all": 1.0}, "group")
        case _:
            assert_never(config.mix)


def _drawn(
    groups: _Groups, keys: Keys, alive: Rows, config: PrepareConfig, accounts: Sequence[Account]
) -> tuple[Rows, str]:
    """The pairs of the mix, and what people should know of it."""
    rows = {name: np.flatnonzero(alive & (groups.labels == place)) for place, name in enumerate(groups.names)}
    available = {name: len(found) for name, found in rows.items() if len(found)}
    if not any(name in available for name in groups.shares):
        raise DataError(_nothing_left(accounts))
    allocation = allocate(available, groups.shares, config.mix.size, groups.what)
    kept = np.zeros(len(keys), dtype=np.bool_)
    for name, count in allocation.counts.items():
        kept[draw(keys.key.view(), rows[name], count, config.seed)] = True
    return kept, allocation.note


def _mark(rows: Rows, fate: PairFate, keys: Keys, accounts: Sequence[Account]) -> None:
    counts = np.bincount(keys.source.view()[rows], minlength=len(accounts))
    for account, count in zip(accounts, counts, strict=True):
        account.pairs[fate] += int(count)


def _unseen(count: int) -> str:
    return (
        f"{count:,} comparisons for near duplicates were left out, where very many pairs share much of their text; "
        "raise filters.near_duplicates.jaccard or filters.near_duplicates.shingle to have them all"
    )


def _nothing_left(accounts: Sequence[Account]) -> str:
    rows, pairs = total_fates(accounts)
    fates = [f"{count:,} rows {fate}" for fate, count in rows.items() if count and fate != "paired"]
    fates += [f"{count:,} pairs {fate}" for fate, count in pairs.items() if count]
    return (
        f"no pair is left of {sum(rows.values()):,} rows ({', '.join(fates) or 'the sources are empty'}); "
        "loosen the filter that dropped most, or set mix to the languages there are"
    )
