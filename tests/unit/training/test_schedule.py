"""Learning rates against transformers' schedules, step by step."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from raylign.config.blocks import TrainerBlock
from raylign.errors import TrainerError
from raylign.training.schedule import Schedule, steps_per_round

Kind = Literal["linear", "cosine", "constant"]
PEAK = 3e-4

TRANSFORMERS: dict[Kind, Callable[[Any, int, int], Any]] = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, _: get_constant_schedule_with_warmup(optimizer, warmup),
}


def block(kind: Kind, warmup: int = 0) -> TrainerBlock:
    return TrainerBlock(learning_rate=PEAK, lr_scheduler_type=kind, warmup_steps=warmup)


def theirs(kind: Kind, warmup: int, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    schedule = TRANSFORMERS[kind](optimizer, warmup, total)
    rates = []
    for _ in range(total):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return rates


def places(sizes: Sequence[int]) -> list[float]:
    """Of every step of rounds that take so many."""
    return [index + step / size for index, size in enumerate(sizes) for step in range(size)]


def rates(sizes: Sequence[int], schedule: Schedule) -> list[float]:
    return [schedule.rate(step, place) for step, place in enumerate(places(sizes))]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (1, 10), (3, 20), (10, 10), (12, 10), (0, 5)])
def test_rates_equal_those_of_transformers_where_rounds_are_alike(
    kind: Kind, rounds: int, warmup: int, total: int
) -> None:
    """Among them warm-up that crosses the end of a round, and that the run is too short for."""
    if total % rounds:
        total *= rounds
    ours = rates([total // rounds] * rounds, Schedule(block(kind, warmup), rounds))
    assert ours == pytest.approx(theirs(kind, warmup, total), rel=1e-12, abs=1e-18)


def test_rates_by_hand() -> None:
    # Two rounds of three steps, two of them warm-up.
    assert rates([3, 3], Schedule(block("linear", 2), 2)) == pytest.approx(
        [PEAK * share for share in (0, 0.5, 1, 0.75, 0.5, 0.25)]
    )
    # half of 1 + cos 0, cos 60 and cos 120 degrees
    assert rates([3], Schedule(block("cosine"), 1)) == pytest.approx([PEAK * share for share in (1, 0.75, 0.25)])


# The second: 48 prompts of K = 2 with up to 4 resamples and steps of 8, where 24 steps were planned and 85 taken.
@pytest.mark.parametrize("sizes", [(7, 1, 4, 12), (14, 19, 24, 28), (3, 3, 1), (6, 1)])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_decay_spans_the_steps_that_are_taken(kind: Kind, warmup: int, sizes: Sequence[int]) -> None:
    """It falls with every step, is 0 behind the last one and nowhere before, and every round has the same share."""
    schedule = Schedule(block(kind, warmup), len(sizes))
    found = rates(sizes, schedule)[warmup:]
    assert min(found) > 0
    assert all(after < before for before, after in pairwise(found))
    assert schedule.rate(sum(sizes), len(sizes) - 1e-12) == pytest.approx(0.0, abs=1e-12)
    if kind == "linear" and not warmup:
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        assert [found[start] for start in starts] == pytest.approx(
            [PEAK * (1 - index / len(sizes)) for index in range(len(sizes))]
        )


def test_a_step_behind_the_last_round_is_refused() -> None:
    """Its rate would be 0, or below."""
    with pytest.raises(TrainerError, match="a step of round 3, and the run has 2"):
        Schedule(block("linear"), 2).rate(10, 2.0)
    assert Schedule(block("constant"), 2).rate(10, 2.0) == PEAK


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_resumed_run_goes_on_with_the_same_rates(kind: Kind) -> None:
    """Steps done and the place where warm-up ended are all that a checkpoint keeps, also in the middle of a round."""
    sizes, warmup = (3, 5, 2, 4), 4
    whole = rates(sizes, Schedule(block(kind, warmup), 4))
    for stop in range(len(whole)):
        before = Schedule(block(kind, warmup), 4)
        found = [before.rate(step, places(sizes)[step]) for step in range(stop)]
        after = Schedule(block(kind, warmup), 4, before.warm_at)
        found += [after.rate(step, places(sizes)[step]) for step in range(stop, len(whole))]
        assert found == whole


def test_a_run_that_goes_on_with_more_rounds_decays_over_these() -> None:
    """Two rounds of two steps, then two more: the rates of step 4 on are those of four rounds from the start."""
    schedule = Schedule(block("linear", 1), 2)
    rates([2, 2], schedule)
    longer = Schedule(block("linear", 1), 4, schedule.warm_at)
    assert [longer.rate(step, step / 2) for step in range(4, 8)] == pytest.approx(theirs("linear", 1, 8)[4:])


def test_steps_that_are_left_out_warm_nothing_up() -> None:
    """As float16 does while it finds its loss scale; the decay begins where warm-up has ended."""
    schedule = Schedule(block("linear", 2), 1)
    done, found = [0, 0, 1, 2, 3, 4], []
    for number, steps_done in enumerate(done):
        found.append(schedule.rate(steps_done, number / len(done)))
    assert found == pytest.approx([0, 0, PEAK / 2, PEAK, PEAK * 2 / 3, PEAK / 3])


@pytest.mark.parametrize(
    ("preferences", "epochs", "steps"),
    [(24, 1, 1), (25, 1, 2), (48, 1, 2), (48, 3, 6), (49, 3, 9), (1, 2, 2), (0, 1, 0)],
)
def test_steps_of_a_round_by_hand(preferences: int, epochs: int, steps: int) -> None:
    """Batch of 2 ranks x 3 x 4 = 24."""
    trainer = TrainerBlock(
        ranks=2, per_device_train_batch_size=3, gradient_accumulation_steps=4, num_train_epochs=epochs
    )
    assert steps_per_round(preferences, trainer) == steps
