"""Optimizer steps: nothing lost, nothing twice, ranks in step, tokens within the budget."""

from collections.abc import Sequence
from itertools import chain

import pytest

from raylign.training.batches import BatchShape, MicroBatch, Step, plan_steps

COSTS = [3 + (7 * index) % 11 for index in range(23)]
"""From 3 to 13 tokens."""
SHAPES = [  # all of 8 preferences a step
    BatchShape(ranks=1, batch=8, micro_batch=8, max_tokens=1000),
    BatchShape(ranks=1, batch=8, micro_batch=1, max_tokens=1000),
    BatchShape(ranks=1, batch=8, micro_batch=8, max_tokens=20),
    BatchShape(ranks=2, batch=8, micro_batch=2, max_tokens=15),
    BatchShape(ranks=2, batch=8, micro_batch=4, max_tokens=1),
    BatchShape(ranks=8, batch=8, micro_batch=1, max_tokens=20),
]


def micro_batches(step: Step) -> list[MicroBatch]:
    return list(chain.from_iterable(step.micro_batches))


def is_filler(micro: MicroBatch) -> bool:
    return micro.weights == (0.0,)


def real(step: Step) -> list[int]:
    """Indices with weight 1."""
    return [index for micro in micro_batches(step) if not is_filler(micro) for index in micro.indices]


def one_step(costs: Sequence[int], shape: BatchShape) -> Step:
    (step,) = plan_steps(costs, shape, epochs=1, seed=0)
    return step


def lanes(step: Step) -> list[list[set[int]]]:
    """What each rank runs, without fillers; indices of a micro-batch as a set."""
    return [[set(micro.indices) for micro in lane if not is_filler(micro)] for lane in step.micro_batches]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 8, 16, 23])
def test_every_preference_is_seen_once_per_epoch(count: int, shape: BatchShape) -> None:
    steps = plan_steps(COSTS[:count], shape, epochs=3, seed=0)
    per_epoch = -(-count // 8)
    assert len(steps) == 3 * per_epoch
    for epoch in range(3):
        mine = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(chain.from_iterable(map(real, mine))) == list(range(count))
        assert [step.count for step in mine] == [len(real(step)) for step in mine]
        assert [step.count for step in mine[:-1]] == [8] * (per_epoch - 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 5, 8, 23])
def test_ranks_run_equally_many_micro_batches_and_only_fillers_weigh_nothing(count: int, shape: BatchShape) -> None:
    for step in plan_steps(COSTS[:count], shape, epochs=2, seed=0):
        assert len(step.micro_batches) == shape.ranks and len({len(lane) for lane in step.micro_batches}) == 1
        for micro in micro_batches(step):
            assert is_filler(micro) or set(micro.weights) == {1.0}
            assert len(micro.indices) == len(micro.weights) <= shape.micro_batch
            assert len(micro.indices) == 1 or sum(COSTS[i] for i in micro.indices) <= shape.max_tokens
        # The rank with the most work has no filler, and a filler costs as little as the step allows.
        assert any(not any(map(is_filler, lane)) for lane in step.micro_batches)
        cheapest = min(COSTS[index] for index in real(step))
        assert all(COSTS[micro.indices[0]] == cheapest for micro in micro_batches(step) if is_filler(micro))


@pytest.mark.parametrize("count", [3, 16, 23])
def test_a_step_holds_the_same_preferences_however_it_is_split_and_whatever_they_cost(count: int) -> None:
    plans = [plan_steps(COSTS[:count], shape, epochs=2, seed=5) for shape in SHAPES]
    plans.append(plan_steps([1] * count, SHAPES[0], epochs=2, seed=5))
    contents = [[sorted(real(step)) for step in steps] for steps in plans]
    assert all(content == contents[0] for content in contents)


def test_the_longest_are_dealt_first_to_the_rank_with_the_fewest_tokens() -> None:
    """8 | 7, 7 + 6 | 8 + 5, 13 + 4 | 13 + 3, 17 + 1 | 16 + 2: both ranks get 18 tokens."""
    step = one_step([1, 2, 3, 4, 5, 6, 7, 8], BatchShape(ranks=2, batch=8, micro_batch=8, max_tokens=100))
    assert lanes(step) == [[{7, 4, 3, 0}], [{6, 5, 2, 1}]]
    assert step.micro_batches[0] == (MicroBatch((7, 4, 3, 0), (1.0,) * 4),)


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [  # rank 0 gets 10 and 5 tokens, rank 1 gets 7, 6 and 4
        (17, [[{0, 3}], [{1, 2, 4}]]),
        (13, [[{0}, {3}], [{1, 2}, {4}]]),
        (12, [[{0}, {3}], [{1, 4}, {2}]]),
        (10, [[{0}, {3}], [{1}, {2, 4}]]),
        (9, [[{0}, {3}], [{1}, {2}, {4}]]),
    ],
)
def test_micro_batches_are_filled_up_to_the_token_budget(max_tokens: int, expected: list[list[set[int]]]) -> None:
    shape = BatchShape(ranks=2, batch=5, micro_batch=3, max_tokens=max_tokens)
    step = one_step([10, 7, 6, 5, 4], shape)
    assert lanes(step) == expected
    fillers = [sum(map(is_filler, lane)) for lane in step.micro_batches]
    assert fillers == ([1, 0] if max_tokens == 9 else [0, 0])


def test_micro_batches_hold_no_more_preferences_than_allowed() -> None:
    step = one_step([5, 4, 3, 2, 1], BatchShape(ranks=1, batch=5, micro_batch=2, max_tokens=100))
    assert lanes(step) == [[{0, 1}, {2, 3}, {4}]]


def test_a_preference_over_the_budget_runs_alone() -> None:
    step = one_step([100, 1, 1], BatchShape(ranks=1, batch=4, micro_batch=4, max_tokens=10))
    assert lanes(step) == [[{0}, {1, 2}]]


def test_one_preference_on_two_ranks_leaves_a_filler() -> None:
    step = one_step([9], BatchShape(ranks=2, batch=8, micro_batch=4, max_tokens=100))
    assert step == Step(1, ((MicroBatch((0,), (1.0,)),), (MicroBatch((0,), (0.0,)),)))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    shape = SHAPES[0]
    first, again, other = (plan_steps([1] * 24, shape, epochs=2, seed=seed) for seed in (3, 3, 4))
    assert first == again
    orders = [tuple(chain.from_iterable(map(real, steps))) for steps in (first[:3], first[3:], other[:3], other[3:])]
    assert len(set(orders)) == 4
    assert plan_steps([1] * 24, shape, epochs=1, seed=3) == first[:3]


def test_no_preferences_give_no_step() -> None:
    assert plan_steps([], SHAPES[0], epochs=3, seed=0) == []


def test_every_rank_makes_the_passes_of_the_longest_preference_beside_it() -> None:
    shape = BatchShape(ranks=2, batch=4, micro_batch=4, max_tokens=10)
    costs, passes = [35, 12, 9, 1], [4, 2, 1, 1]
    (step,) = plan_steps(costs, shape, epochs=1, seed=0, passes=passes)
    found = [[(micro.indices, micro.passes) for micro in lane] for lane in step.micro_batches]
    assert found == [[((0,), 4), ((3,), 1)], [((1,), 4), ((2, 3), 1)]]
    assert step.micro_batches[0][1].weights == (0.0,)


def test_a_filler_above_the_budget_is_lined_up_too() -> None:
    shape = BatchShape(ranks=2, batch=1, micro_batch=1, max_tokens=10)
    (step,) = plan_steps([35], shape, epochs=1, seed=0, passes=[4])
    assert [[micro.passes for micro in lane] for lane in step.micro_batches] == [[4], [4]]
