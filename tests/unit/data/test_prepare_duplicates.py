"""Exact and near duplicates, told from keys and signatures."""

from pathlib import Path

import numpy as np
import pytest

from raylign.data.prepare import duplicates
from raylign.data.prepare.duplicates import (
    PLACES,
    SignatureFile,
    band_width,
    exact_duplicates,
    near_duplicates,
    shingles,
    signatures,
)

WORDS = [f"word{number}" for number in range(400)]


def near(folder: Path, texts: list[str], jaccard: float = 0.8, examples: list[int] | None = None) -> list[bool]:
    return [bool(dropped) for dropped in found(folder, texts, jaccard, examples).rows]


def found(
    folder: Path, texts: list[str], jaccard: float = 0.8, examples: list[int] | None = None
) -> duplicates.NearDuplicates:
    file = SignatureFile(folder / "signatures")
    file.add(signatures(texts, 3))
    file.close()
    rows = np.array(range(len(texts)) if examples is None else examples, dtype=np.uint32)
    return near_duplicates(file, rows, np.ones(len(texts), dtype=np.bool_), jaccard)


def test_the_first_of_equal_keys_is_no_duplicate() -> None:
    keys = np.array([7, 3, 7, 2**64 - 1, 3, 7], dtype=np.uint64)
    assert exact_duplicates(keys).tolist() == [False, False, True, False, True, True]


def test_shingles_are_words_in_a_row_and_chinese_characters_are_words() -> None:
    assert shingles("One, TWO three; four!", 3) == ["one two three", "two three four"]
    assert shingles("我爱Python语言", 3) == ["我 爱 python", "爱 python 语", "python 语 言"]
    assert shingles("Two words", 3) == ["two words"]
    assert shingles("?!", 3) == ["?!"]


def test_signatures_estimate_the_shared_shingles() -> None:
    # 98 shingles each; the second has 3 others around one changed word: 95 of 101 are shared.
    first, second = WORDS[:100], [*WORDS[:50], "changed", *WORDS[51:100]]
    one, other = signatures([" ".join(first), " ".join(second)], 3)
    assert (one == other).mean() == pytest.approx(95 / 101, abs=0.08)
    one, other = signatures([" ".join(WORDS[:100]), " ".join(WORDS[200:300])], 3)
    assert (one == other).mean() < 0.05


def test_bands_are_as_wide_as_finds_nine_in_ten_at_the_limit() -> None:
    # 1 - (1 - .8^8)^16 = 0.947 and 1 - (1 - .8^16)^8 = 0.203
    assert band_width(0.8) == 8
    assert band_width(0.5) == 2
    assert band_width(1.0) == PLACES


def test_the_later_of_two_similar_texts_goes(tmp_path: Path) -> None:
    text, other = " ".join(WORDS[:100]), " ".join(WORDS[200:300])
    assert near(tmp_path, [text, other, f"{text.upper()}!", f"{text} more", other]) == [False, False, True, True, True]


def test_half_similar_texts_stay(tmp_path: Path) -> None:
    texts = [" ".join(WORDS[:100]), " ".join([*WORDS[:60], *WORDS[200:240]])]
    assert near(tmp_path, texts) == [False, False]
    # 58 of 138 shingles are shared.
    assert near(tmp_path, texts, jaccard=0.5) == [False, False]


def test_pairs_of_one_example_are_not_compared_with_each_other(tmp_path: Path) -> None:
    text = " ".join(WORDS[:50])
    assert near(tmp_path, [text, text, text], examples=[1, 1, 2]) == [False, False, True]


def test_many_groups_agree_with_a_comparison_of_every_two(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    bases = [generator.choice(WORDS, 60).tolist() for _ in range(40)]
    texts = []
    for number in range(400):
        words = list(bases[number % 40])
        words[int(generator.integers(60))] = f"new{number}"
        texts.append(" ".join(words))
    marks = signatures(texts, 3)
    close = (marks[:, None, :] == marks[None, :, :]).mean(axis=2) >= 0.7
    expected = [bool(close[row, :row].any()) for row in range(400)]
    dropped = near(tmp_path, texts, jaccard=0.7)
    assert sum(expected) >= 350
    # A pair may be missed by every band, and a chain may end at another of its members: few, and never one too many.
    assert sum(drop and not wanted for drop, wanted in zip(dropped, expected, strict=True)) == 0
    assert sum(wanted and not drop for drop, wanted in zip(dropped, expected, strict=True)) <= 8


def test_comparisons_that_are_left_out_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MAX_LEADERS", 1)
    # Three examples' worth of the same text: with one leader, the pairs of its own example wait for the next.
    text = " ".join(WORDS[:50])
    outcome = found(tmp_path, [text] * 4, examples=[1, 1, 1, 2])
    assert outcome.rows.tolist() == [False, False, False, True]
    assert outcome.unseen == 2 * (PLACES // band_width(0.8))
