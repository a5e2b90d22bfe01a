"""Which pairs repeat an earlier one, told from their keys and signatures alone."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raylign.data.prepare.signatures import PLACES, SignatureFile, band_width

MAX_LEADERS = 64
"""Pairs of one band that the others in it are compared with, so that time does not grow with their square."""


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """`rows` says of each pair whether it is one. `unseen` counts comparisons left out because a band was too full."""

    rows: NDArray[np.bool_]
    unseen: int


def exact_duplicates(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether an equal key stands before each: [pairs]."""
    repeated = np.ones(len(keys), dtype=np.bool_)
    repeated[np.unique(keys, return_index=True)[1]] = False
    return repeated


def near_duplicates(
    signatures: SignatureFile, examples: NDArray[np.uint32], alive: NDArray[np.bool_], jaccard: float
) -> NearDuplicates:
    """Of the pairs `alive`, those similar to an earlier one that is of another Example.

    Pairs that share a band of their signatures are compared on all places (locality-sensitive hashing, Indyk and
    Motwani 1998). `examples` tells which pairs come from one Example: they share their prompt and are never compared.
    """
    dropped = np.zeros(len(alive), dtype=np.bool_)
    unseen, width = 0, band_width(jaccard)
    for band in range(PLACES // width):
        rows = np.flatnonzero(alive & ~dropped)
        hashes = signatures.band(band, width)[rows]
        order = np.argsort(hashes, kind="stable")
        unseen += _compare(signatures, examples, rows[order], hashes[order], jaccard, dropped)
    return NearDuplicates(dropped, unseen)


def _compare(
    signatures: SignatureFile,
    examples: NDArray[np.uint32],
    rows: NDArray[np.intp],
    hashes: NDArray[np.uint64],
    jaccard: float,
    dropped: NDArray[np.bool_],
) -> int:
    """Compare pairs of equal `hashes` with the first of them, then the rest with the first of the rest, and so on.

    `rows` are sorted by hash and, within, by place. Marks `dropped`; returns how many pairs were not compared.
    """
    for _ in range(MAX_LEADERS):
        rows, hashes = _shared(rows, hashes)
        if not len(rows):
            return 0
        first = np.concatenate(([True], hashes[1:] != hashes[:-1]))
        leaders = rows[np.flatnonzero(first)[np.cumsum(first) - 1]]
        others = np.flatnonzero(~first)
        same = signatures.similarity(rows[others], leaders[others]) >= jaccard
        same &= examples[rows[others]] != examples[leaders[others]]
        dropped[rows[others[same]]] = True
        rest = others[~same]
        rows, hashes = rows[rest], hashes[rest]
    rows, _ = _shared(rows, hashes)
    return len(rows)


def _shared(rows: NDArray[np.intp], hashes: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.uint64]]:
    """Those whose hash stands at least twice."""
    if len(rows) < 2:
        return rows[:0], hashes[:0]
    equal = hashes[1:] == hashes[:-1]
    shared = np.concatenate(([False], equal)) | np.concatenate((equal, [False]))
    return rows[shared], hashes[shared]
