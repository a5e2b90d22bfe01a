"""Prompts and completions as the tensors of one forward pass, by hand."""

import pytest
import torch

from raylign.records import Completions
from raylign.training.sequences import Layout, Segment, TokenBatch, token_batch, token_cost

GROUPS = [
    Completions((5, 6), ((7, 8, 9), (), (4,))),
    Completions((3,), ((2, 1),)),
]
LABELS, OWNERS = [7, 8, 9, 4, 2, 1], [0, 0, 0, 2, 3, 3]
"""Completion 1 is empty."""


def checked(layout: Layout) -> TokenBatch:
    """What all layouts have in common is asserted here."""
    batch = token_batch(GROUPS, layout, pad_id=0)
    assert (batch.labels.tolist(), batch.owners.tolist(), batch.completions) == (LABELS, OWNERS, 4)
    integers = (batch.input_ids, batch.position_ids, batch.predictors, batch.labels, batch.owners, batch.ends)
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert batch.input_ids.shape == batch.position_ids.shape == batch.attention_mask.shape
    return batch


def test_a_shared_prompt_stands_once_before_its_completions() -> None:
    batch = checked("shared")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 2]]
    assert batch.attention_mask.tolist() == [[1] * 9]
    # 6 at place 1 predicts the first token of both completions, 3 at place 6 that of the second group.
    assert batch.predictors.tolist() == [1, 2, 3, 1, 6, 7]
    assert batch.ends.tolist() == [4, 1, 5, 8]  # completion 1 has no token, so that it ends where its prompt does
    assert batch.segments == (Segment(0, 2, (3, 0, 1)), Segment(6, 1, (2,)))


def test_packed_prompts_stand_before_each_completion() -> None:
    batch = checked("packed")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 5, 6, 5, 6, 4, 3, 2, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 0, 1, 2]]
    assert batch.predictors.tolist() == [1, 2, 3, 8, 10, 11]
    assert batch.ends.tolist() == [4, 6, 9, 12]
    assert batch.segments == (Segment(0, 2, (3,)), Segment(5, 2, (0,)), Segment(7, 2, (1,)), Segment(10, 1, (2,)))


def test_padded_rows_have_one_completion_each() -> None:
    batch = checked("padded")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 0, 0, 0], [5, 6, 4, 0, 0], [3, 2, 1, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 4
    assert batch.predictors.tolist() == [1, 2, 3, 11, 15, 16]
    assert batch.ends.tolist() == [4, 6, 12, 17]
    assert batch.segments == ()


def test_a_pad_id_inside_the_text_stays_real() -> None:
    batch = token_batch([Completions((9, 9), ((9,), ()))], "padded", pad_id=9)
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert (batch.labels.tolist(), batch.predictors.tolist(), batch.ends.tolist()) == ([9], [1], [2, 4])


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_each_label_stands_right_after_its_predictor_in_its_own_completion(layout: Layout) -> None:
    batch = token_batch(GROUPS, layout, pad_id=0)
    positions, ids = batch.position_ids.flatten(), batch.input_ids.flatten()
    starts = [2, 2, 2, 1]
    seen = [0] * 4
    for predictor, label, owner in zip(batch.predictors, batch.labels, batch.owners, strict=True):
        assert positions[predictor] == starts[owner] + seen[owner] - 1
        if seen[owner]:
            assert ids[predictor + 1] == label
        seen[owner] += 1
    assert seen == [3, 0, 1, 2]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_completions_without_any_token_leave_nothing_to_predict(layout: Layout) -> None:
    batch = token_batch([Completions((5, 6), ((), ()))], layout, pad_id=0)
    assert batch.completions == 2
    assert [tensor.shape for tensor in (batch.predictors, batch.labels, batch.owners)] == [(0,)] * 3
    assert {tensor.dtype for tensor in (batch.predictors, batch.labels, batch.owners)} == {torch.int64}


@pytest.mark.parametrize(("layout", "costs"), [("shared", [6, 3]), ("packed", [10, 3]), ("padded", [10, 3])])
def test_costs_are_tokens_without_padding(layout: Layout, costs: list[int]) -> None:
    assert [token_cost(group, layout) for group in GROUPS] == costs
    if layout != "padded":
        assert token_batch(GROUPS, layout, pad_id=0).input_ids.numel() == sum(costs)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_batch_moves_as_a_whole(layout: Layout) -> None:
    moved = token_batch(GROUPS, layout, pad_id=0).to(torch.device("meta"))
    tensors = [part for part in moved if isinstance(part, torch.Tensor)]
    assert len(tensors) == 7 and all(tensor.is_meta for tensor in tensors)
    assert moved.completions == 4 and len(moved.segments) == (2 if layout == "shared" else 0)
