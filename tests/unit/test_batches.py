"""Optimizer steps and padded tensors: nothing lost, nothing twice, ranks in step."""

from itertools import chain

import pytest
import torch

from raylign.records import Candidate, Preference, Prompt
from raylign.training.batches import MicroBatch, Step, pad_sequences, pair_rows, plan_steps

SHAPES = [  # ranks, micro_batch, accumulation
    (1, 8, 1),
    (1, 1, 8),
    (2, 4, 1),
    (2, 2, 2),
    (8, 1, 1),
]


def micro_batches(step: Step) -> list[MicroBatch]:
    return list(chain.from_iterable(step.micro_batches))


def real(step: Step) -> list[int]:
    """Indices with weight 1."""
    return [
        index
        for micro in micro_batches(step)
        for index, weight in zip(micro.indices, micro.weights, strict=True)
        if weight == 1.0
    ]


def plan(count: int, shape: tuple[int, int, int], epochs: int = 1, seed: int = 0) -> list[Step]:
    ranks, micro_batch, accumulation = shape
    return plan_steps(count, ranks=ranks, micro_batch=micro_batch, accumulation=accumulation, epochs=epochs, seed=seed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 8, 16, 21])
def test_every_preference_is_seen_once_per_epoch(count: int, shape: tuple[int, int, int]) -> None:
    steps = plan(count, shape, epochs=3)
    per_epoch = -(-count // 8)
    assert len(steps) == 3 * per_epoch
    for epoch in range(3):
        seen = [index for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for index in real(step)]
        assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 5, 8, 21])
def test_every_rank_runs_as_many_micro_batches_as_the_others(count: int, shape: tuple[int, int, int]) -> None:
    ranks, micro_batch, accumulation = shape
    for step in plan(count, shape, epochs=2):
        assert [len(mine) for mine in step.micro_batches] == [accumulation] * ranks
        assert all(1 <= len(micro.indices) <= micro_batch for micro in micro_batches(step))


@pytest.mark.parametrize("count", [3, 16, 21])
def test_a_step_holds_the_same_preferences_however_it_is_split(count: int) -> None:
    splits = [[sorted(real(step)) for step in plan(count, shape, epochs=2, seed=5)] for shape in SHAPES]
    assert all(split == splits[0] for split in splits)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_count_of_a_step_is_its_real_preferences(shape: tuple[int, int, int]) -> None:
    assert [step.count for step in plan(21, shape)] == [8, 8, 5]
    assert [len(real(step)) for step in plan(21, shape)] == [8, 8, 5]


@pytest.mark.parametrize("shape", SHAPES)
def test_fillers_weigh_nothing_and_stand_only_where_a_last_step_is_short(shape: tuple[int, int, int]) -> None:
    ranks, _, accumulation = shape
    for count in (1, 5, 12, 16, 23):
        steps = plan(count, shape, epochs=2)
        for step in steps:
            fillers = [micro for micro in micro_batches(step) if 0.0 in micro.weights]
            assert len(fillers) == max(0, ranks * accumulation - step.count)
            assert all(micro.weights == (0.0,) and micro.indices[0] in real(step) for micro in fillers)
        per_epoch = len(steps) // 2
        assert all(step.count == 8 for step in steps[: per_epoch - 1])


def test_two_ranks_by_hand() -> None:
    """Five preferences in the order o0..o4 over 2 ranks x 2 micro-batches of at most 2: dealt like cards."""
    (step,) = plan(5, (2, 2, 2))
    o = [index for (index,) in (micro.indices for s in plan(5, (1, 1, 1)) for micro in micro_batches(s))]
    assert step == Step(
        5,
        (
            (MicroBatch((o[0], o[4]), (1.0, 1.0)), MicroBatch((o[2],), (1.0,))),
            (MicroBatch((o[1],), (1.0,)), MicroBatch((o[3],), (1.0,))),
        ),
    )


def test_one_preference_on_two_ranks_leaves_a_filler() -> None:
    (step,) = plan(1, (2, 4, 1))
    assert step == Step(1, ((MicroBatch((0,), (1.0,)),), (MicroBatch((0,), (0.0,)),)))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first, again, other = (plan(24, (1, 8, 1), epochs=2, seed=seed) for seed in (3, 3, 4))
    assert first == again
    orders = [tuple(chain.from_iterable(map(real, steps))) for steps in (first[:3], first[3:], other[:3], other[3:])]
    assert len(set(orders)) == 4
    assert plan(24, (1, 8, 1), epochs=1, seed=3) == first[:3]


def test_no_preferences_give_no_step() -> None:
    assert plan(0, (2, 4, 1), epochs=3) == []


def test_padded_rows_by_hand() -> None:
    rows = pad_sequences([((5, 6), (7, 8, 9)), ((3,), (4,)), ((2, 2), ())], pad_id=0)
    assert rows.input_ids.tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0], [2, 2, 0, 0, 0]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert rows.targets.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert (rows.input_ids.dtype, rows.targets.dtype) == (torch.int64, torch.bool)


def test_a_pad_id_inside_the_text_stays_real() -> None:
    rows = pad_sequences([((9, 9), (9,)), ((9,), (9,))], pad_id=9)
    assert rows.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert rows.targets.int().tolist() == [[0, 0, 1], [0, 1, 0]]


def candidate(name: str, index: int, tokens: tuple[int, ...]) -> Candidate:
    return Candidate(name, index, tokens, (-1.0,) * len(tokens), "", "stop", 0, 0)


def test_chosen_rows_come_first_then_rejected_in_the_same_order() -> None:
    pairs = [
        Preference(
            Prompt(name, (), (start, start)),
            (candidate(name, 3, (start + 1,)), candidate(name, 0, (start + 2, start + 3))),
            (1.0, 0.0),
            (1.0, 1.0),
        )
        for name, start in (("a", 10), ("b", 20))
    ]
    assert pair_rows(pairs) == [
        ((10, 10), (11,)),
        ((20, 20), (21,)),
        ((10, 10), (12, 13)),
        ((20, 20), (22, 23)),
    ]
