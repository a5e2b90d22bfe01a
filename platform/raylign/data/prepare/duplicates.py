"""Which pairs repeat an earlier one, by a few numbers (about thirty bytes) that are remembered of every pair."""

import json
import math
import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
import rensa
import xxhash
from numpy.typing import NDArray

from raylign.data.examples import Example
from raylign.data.prepare.accounts import PairText
from raylign.data.prepare.ratings import Pair

Scalar = TypeVar("Scalar", bound=np.generic)

PLACES = 128
SEED = 42
TYPE = np.dtype("<u2")
"""Two bytes of each hash: unequal ones agree by chance once in 65,536."""
CHUNK = 16_384
DETECTED = 0.9
_CHARACTER_WORDS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f"
"""Scripts that set no blanks between words, and Hangul: each character is a word."""
TOKENS = re.compile(rf"[{_CHARACTER_WORDS}]|[^\W{_CHARACTER_WORDS}]+")
MAX_LEADERS = 64
"""Pairs of one band that the others in it are compared with, so that time does not grow with their square."""


def key_of(example: Example, pair: Pair) -> int:
    """64 bits (XXH3) of every message of a pair and of its tools."""
    parts = [example.prompt, pair.chosen, pair.rejected, example.tools]
    return xxhash.xxh3_64_intdigest(json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str).encode())


class Column(Generic[Scalar]):
    """Numbers in a row, appended one by one and read as a NumPy array."""

    def __init__(self, kind: type[Scalar]) -> None:
        self._kind = np.dtype(kind)
        self._values: array[Any] = array(self._kind.char)

    def __len__(self) -> int:
        return len(self._values)

    def append(self, value: float) -> None:
        self._values.append(value)

    def view(self) -> NDArray[Scalar]:
        """All numbers, without a copy; nothing can be appended while the view lives."""
        return np.frombuffer(self._values, dtype=self._kind)


class Keys:
    """Parallel columns, one place for each pair that passed the filters, in the order of the sources."""

    def __init__(self) -> None:
        self.key, self.example = Column(np.uint64), Column(np.uint32)
        self.source, self.language = Column(np.uint16), Column(np.uint16)
        self.prompt_chars, self.chosen_chars, self.rejected_chars = (Column(np.uint32) for _ in range(3))
        self.score_chosen, self.score_rejected = Column(np.float32), Column(np.float32)
        """NaN for pairs without scores."""
        self.languages: list[str] = []
        """Codes that `language` counts through."""

    def __len__(self) -> int:
        return len(self.key)

    def add(self, key: int, example: int, language: str, source: int, text: PairText, pair: Pair) -> None:
        if language not in self.languages:
            self.languages.append(language)
        self.key.append(key)
        self.example.append(example)
        self.source.append(source)
        self.language.append(self.languages.index(language))
        self.prompt_chars.append(len(text.prompt))
        self.chosen_chars.append(len(text.chosen))
        self.rejected_chars.append(len(text.rejected))
        self.score_chosen.append(math.nan if pair.score_chosen is None else pair.score_chosen)
        self.score_rejected.append(math.nan if pair.score_rejected is None else pair.score_rejected)


def signatures(texts: Sequence[str], shingle: int) -> NDArray[np.uint16]:
    """MinHash (Broder 1997) of each text: [texts, PLACES]. Case and punctuation do not count."""
    sets = [shingles(text, shingle) for text in texts]
    rows = rensa.RMinHash.digest_matrix_from_token_sets(sets, PLACES, SEED).to_rows()
    return (np.array(rows, dtype=np.uint32).reshape(len(texts), PLACES) & 0xFFFF).astype(TYPE)


def shingles(text: str, size: int) -> list[str]:
    """Every `size` words in a row; the whole text where it has fewer."""
    words = TOKENS.findall(text.lower())
    if len(words) < size:
        return [" ".join(words) or text]
    return [" ".join(part) for part in zip(*(words[start:] for start in range(size)), strict=False)]


def band_width(jaccard: float) -> int:
    """Places of a band: the most with which texts of this similarity share a band with probability DETECTED.

    P = 1 - (1 - jaccard^r)^(PLACES / r) for r places (Leskovec et al., Mining of Massive Datasets, section 3.4.2).
    """
    widths = [1 << power for power in range(PLACES.bit_length())]
    return max(r for r in widths if r == 1 or 1.0 - (1.0 - jaccard**r) ** float(PLACES // r) >= DETECTED)


class SignatureFile:
    """Signatures in the order they were added; only the parts asked for are in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: BinaryIO = path.open("wb")
        self.count = 0

    def add(self, batch: NDArray[np.uint16]) -> None:
        self._stream.write(np.ascontiguousarray(batch).tobytes())
        self.count += len(batch)

    def close(self) -> None:
        self._stream.close()

    def band(self, number: int, width: int) -> NDArray[np.uint64]:
        """A hash of places `number * width` and on of every signature: [count]."""
        hashes = np.empty(self.count, dtype=np.uint64)
        with self._path.open("rb") as stream:
            for start in range(0, self.count, CHUNK):
                rows = np.fromfile(stream, TYPE, min(CHUNK, self.count - start) * PLACES).reshape(-1, PLACES)
                hashes[start : start + len(rows)] = _hash(rows[:, number * width : (number + 1) * width])
        return hashes

    def similarity(self, first: NDArray[np.intp], second: NDArray[np.intp]) -> NDArray[np.float32]:
        """The share of places in which signatures `first[i]` and `second[i]` agree: [len(first)]."""
        found = np.empty(len(first), dtype=np.float32)
        with self._path.open("rb") as stream:
            for start in range(0, len(first), CHUNK):
                part = slice(start, start + CHUNK)
                one, other = (_rows(stream.fileno(), rows[part]) for rows in (first, second))
                found[part] = (one == other).mean(axis=1, dtype=np.float32)
        return found


def _rows(descriptor: int, rows: NDArray[np.intp]) -> NDArray[np.uint16]:
    """Read one by one: pages of a mapped file would count as memory of the process."""
    size = PLACES * TYPE.itemsize
    read = b"".join(os.pread(descriptor, size, row * size) for row in rows.tolist())
    return np.frombuffer(read, TYPE).reshape(-1, PLACES)


def _hash(places: NDArray[np.uint16]) -> NDArray[np.uint64]:
    """FNV-1a over the places of each row; equal rows have equal hashes."""
    hashes = np.full(len(places), 0xCBF29CE484222325, dtype=np.uint64)
    for column in range(places.shape[1]):
        hashes = (hashes ^ places[:, column].astype(np.uint64)) * np.uint64(0x100000001B3)
    return hashes


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
