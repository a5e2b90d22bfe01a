"""Shares, counts and draws of the mix."""

import numpy as np
import pytest

from raylign.data.prepare.decide import allocate, draw
from raylign.errors import DataError

SHARES = {"en": 0.7, "zh": 0.3}


def test_a_size_that_can_be_met_is_met_exactly() -> None:
    allocation = allocate({"en": 900, "zh": 400, "fr": 5}, SHARES, 1000, "language")
    assert (allocation.counts, allocation.note) == ({"en": 700, "zh": 300}, "")


def test_rounding_goes_to_the_largest_remainder() -> None:
    # 4.9 and 2.1 of 7; 0.7 and 0.3 of 1
    assert allocate({"en": 90, "zh": 40}, SHARES, 7, "language").counts == {"en": 5, "zh": 2}
    assert allocate({"en": 90, "zh": 40}, SHARES, 1, "language").counts == {"en": 1, "zh": 0}


def test_a_size_that_cannot_be_met_keeps_the_shares_and_says_what_was_short() -> None:
    allocation = allocate({"en": 900, "zh": 30}, SHARES, 1000, "language")
    assert allocation.counts == {"en": 70, "zh": 30}
    assert allocation.note.startswith(
        "mix.size=1000 cannot be met: language zh has 30 pairs, a share of 0.3 needs 300; "
        "100 pairs came out with exact shares. Add zh data, lower mix.size"
    )


def test_without_a_size_the_scarcest_sets_it() -> None:
    allocation = allocate({"en": 900, "zh": 31}, SHARES, None, "language")
    # 31 / .3 = 103.3; 72.1 and 30.9
    assert allocation.counts == {"en": 72, "zh": 31}
    assert "language zh sets the size: 31 pairs at a share of 0.3 allow 103 in all" in allocation.note


def test_weights_are_relative() -> None:
    assert allocate({"a": 50, "b": 50}, {"a": 3.0, "b": 1.0}, 20, "source").counts == {"a": 15, "b": 5}


def test_one_group_without_a_size_needs_no_note() -> None:
    assert allocate({"all": 5}, {"all": 1.0}, None, "group").note == ""


def test_an_absent_language_is_an_error_with_what_there_is() -> None:
    with pytest.raises(DataError, match=r"0\.3 of its pairs from language zh and 0 are left .*en 9, fr 1.*mix\.type"):
        allocate({"en": 9, "fr": 1}, SHARES, None, "language")


def test_a_draw_depends_on_the_seed_and_on_nothing_else_that_is_there() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, 1000, dtype=np.uint64)
    rows = np.arange(0, 1000, 2)
    drawn = draw(keys, rows, 100, seed=1)
    assert len(set(drawn.tolist())) == 100 and set(drawn.tolist()) <= set(rows.tolist())
    assert drawn.tolist() == sorted(drawn.tolist())
    assert draw(keys, rows, 100, seed=1).tolist() == drawn.tolist()
    assert draw(keys, rows, 100, seed=2).tolist() != drawn.tolist()
    # A smaller draw is a part of a larger one, and other rows in front change no choice.
    assert set(draw(keys, rows, 50, seed=1).tolist()) < set(drawn.tolist())
    moved = draw(np.concatenate((keys[:10], keys)), rows + 10, 100, seed=1)
    assert (moved - 10).tolist() == drawn.tolist()


def test_draws_are_spread_evenly() -> None:
    drawn = draw(np.arange(10_000, dtype=np.uint64), np.arange(10_000), 5000, seed=3)
    # The standard deviation of the first half's share is 0.005.
    assert (drawn < 5000).mean() == pytest.approx(0.5, abs=0.03)
