"""Between the passes: which pairs stay, decided on their keys alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from raylign.config.prepare import LanguageMixBlock, PlainMixBlock, PrepareConfig, SourceMixBlock
from raylign.data.prepare.accounts import Account, PairFate, total_fates
from raylign.data.prepare.collect import Collected
from raylign.data.prepare.duplicates import exact_duplicates, near_duplicates
from raylign.data.prepare.keys import Keys
from raylign.data.prepare.mix import allocate, draw
from raylign.errors import DataError

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
