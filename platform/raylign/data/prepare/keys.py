"""What is remembered of every pair while its text lies on disk: a few numbers, about thirty bytes."""

import json
import math
from array import array
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from raylign.data.examples import Example
from raylign.data.prepare.filters import PairText
from raylign.data.prepare.ratings import Pair

Scalar = TypeVar("Scalar", bound=np.generic)


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
