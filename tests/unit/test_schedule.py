"""Learning rates against transformers' schedules, step by step."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from raylign.config.blocks import TrainerBlock
from raylign.training.schedule import learning_rate, planned_steps, steps_per_round

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


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (1, 10), (3, 11), (10, 10), (12, 10), (0, 1)])
def test_rates_equal_those_of_transformers(kind: Kind, warmup: int, total: int) -> None:
    ours = [learning_rate(step, total, block(kind, warmup)) for step in range(total)]
    assert ours == pytest.approx(theirs(kind, warmup, total), rel=1e-12, abs=1e-18)


def test_rates_by_hand() -> None:
    linear, cosine = block("linear", 2), block("cosine")
    assert [learning_rate(step, 6, linear) / PEAK for step in range(7)] == pytest.approx(
        [0, 0.5, 1, 0.75, 0.5, 0.25, 0]
    )
    # half of 1 + cos 0, cos 60, cos 120 and cos 180 degrees
    assert [learning_rate(step, 3, cosine) / PEAK for step in range(4)] == pytest.approx([1, 0.75, 0.25, 0], abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_rate_stays_0_past_the_planned_end(kind: Kind) -> None:
    assert [learning_rate(step, 5, block(kind)) for step in (5, 6, 9, 10)] == pytest.approx([0.0] * 4, abs=1e-18)


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
    assert planned_steps(preferences, 5, trainer) == 5 * steps
