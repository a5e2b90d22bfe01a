"""What a row's blocks see, worked out by hand, and which of them share a batch."""

import pytest
import torch

from raylign.training.kernels import attention_blocked
from raylign.training.kernels.attention_blocked import Batch, batches_of
from raylign.training.sequences import Segment


def seen(batches: tuple[Batch, ...]) -> dict[int, set[int]]:
    """Positions that each position of the row sees. No query may be in two batches, no weight in a batch twice."""
    found: dict[int, set[int]] = {}
    for batch in batches:
        blocks, _, width, height = batch.mask.shape
        keys = batch.keys.view(blocks, height)
        for slot in batch.slots.tolist():
            visible = keys[slot // width][batch.mask[slot // width, 0, slot % width] == 0].tolist()
            query = int(batch.queries[slot])
            assert query not in found and len(visible) == len(set(visible))
            found[query] = set(visible)
    return found


SEGMENTS = (Segment(0, 2, (2, 1)), Segment(5, 1, (0, 3)))
"""Positions 0 1 | 2 3 | 4, then 5 | 6 7 8."""


def test_a_query_sees_its_prompt_and_its_own_completion_so_far() -> None:
    assert seen(batches_of(SEGMENTS, None, torch.float32)) == {
        **{0: {0}, 1: {0, 1}, 2: {0, 1, 2}, 3: {0, 1, 2, 3}, 4: {0, 1, 4}},
        **{5: {5}, 6: {5, 6}, 7: {5, 6, 7}, 8: {5, 6, 7, 8}},
    }


def test_a_window_hides_what_is_further_back() -> None:
    assert seen(batches_of(SEGMENTS, 2, torch.float32)) == {
        **{0: {0}, 1: {0, 1}, 2: {1, 2}, 3: {2, 3}, 4: {1, 4}},
        **{5: {5}, 6: {5, 6}, 7: {6, 7}, 8: {7, 8}},
    }


def test_a_padded_query_sees_something_so_that_its_softmax_is_finite() -> None:
    for batch in batches_of(SEGMENTS, None, torch.float32):
        assert (batch.mask == 0).any(-1).all()


@pytest.mark.parametrize("window", [None, 3, 200])
def test_cut_pieces_see_what_whole_ones_do(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = (Segment(0, 40, (30, 70)), Segment(140, 5, (90,)))
    whole = seen(batches_of(segments, window, torch.float32))
    monkeypatch.setattr(attention_blocked, "_BLOCK", 16)
    batches_of.cache_clear()
    cut = seen(batches_of(segments, window, torch.float32))
    batches_of.cache_clear()
    assert whole == cut and whole.keys() == set(range(235))


def test_short_pieces_share_a_few_batches_without_much_padding() -> None:
    """Sixteen pieces of 30 to 77 queries; their keys, up to 77, are padded to 96."""
    short = tuple(Segment(107 * number, 40, (30 + number, 30)) for number in range(8))
    batches = batches_of(short, None, torch.float32)
    assert len(batches) == 2 and sum(len(batch.mask) for batch in batches) == 16
    alone = sum((70 + n) ** 2 + 30 * 70 for n in range(8))
    assert sum(batch.mask.numel() for batch in batches) < 1.5 * alone * 96 / 70


def test_a_long_piece_is_not_what_short_ones_are_padded_to() -> None:
    segments = (*(Segment(100 * number, 40, (30, 30)) for number in range(8)), Segment(800, 100, (900,)))
    batches = batches_of(segments, None, torch.float32)
    assert all(batch.mask.shape[3] <= 96 for batch in batches if len(batch.mask) > 2)
    assert max(batch.mask.shape[3] for batch in batches) == 1024
