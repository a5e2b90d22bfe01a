"""Which rows a round trains on: a pure function of the round's number, so that a resumed run takes the same."""

from collections.abc import Sequence
from typing import TypeVar

from raylign.config.blocks import TrainerBlock
from raylign.config.offline import OfflineScheduleBlock
from raylign.prompts.draw import shuffled
from raylign.training.schedule import steps_per_round

Row = TypeVar("Row")


def rows_of_round(rows: Sequence[Row], index: int, rounds_per_epoch: int, seed: int) -> tuple[Row, ...]:
    """The rows of round `index` (from 1), all different.

    Every epoch goes through a seeded permutation of `rows` in `rounds_per_epoch` parts whose sizes differ by one.
    """
    epoch, part = divmod(index - 1, rounds_per_epoch)
    order = shuffled(len(rows), seed, epoch)
    start, end = (len(rows) * edge // rounds_per_epoch for edge in (part, part + 1))
    return tuple(rows[place] for place in order[start:end])


def total_steps(rows: int, schedule: OfflineScheduleBlock, trainer: TrainerBlock) -> int:
    """Optimizer steps of all rounds."""
    parts = schedule.rounds_per_epoch
    sizes = [rows * (part + 1) // parts - rows * part // parts for part in range(parts)]
    return schedule.num_train_epochs * sum(steps_per_round(size, trainer) for size in sizes)
