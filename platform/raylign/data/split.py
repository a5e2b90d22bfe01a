"""Training and held-out rows of a data set, and the rows of each round."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from raylign.config.blocks import TrainerBlock
from raylign.config.offline import OfflineScheduleBlock
from raylign.errors import DataError
from raylign.prompts.load import shuffled
from raylign.records import Preference
from raylign.training.schedule import steps_per_round

Ids = tuple[int, ...]


def key(row: Preference) -> tuple[Ids, ...]:
    """Equal for exact duplicates: the ids of the prompt and of all candidates."""
    return (row.prompt.token_ids, *(candidate.token_ids for candidate in row.candidates))


def split(
    rows: Sequence[Preference], count: int, seed: int, where: str
) -> tuple[tuple[Preference, ...], tuple[Preference, ...]]:
    """(train, held out): prompts are drawn with all their rows until `count` rows are; both keep the source's order.

    Raises DataError when that leaves none to train on.
    """
    sizes = Counter(row.prompt.token_ids for row in rows)
    chosen = _drawn(sizes, count, seed)
    train = tuple(row for row in rows if row.prompt.token_ids not in chosen)
    if not train:
        raise DataError(
            f"{where}: data.held_out={count} leaves none of {len(rows)} usable rows ({len(sizes)} different prompts) "
            "to train on; lower it or add rows"
        )
    return train, tuple(_held_out(row) for row in rows if row.prompt.token_ids in chosen)


def _drawn(sizes: Counter[Ids], count: int, seed: int) -> set[Ids]:
    """Drawn as `raylign.prompts` draws: in an order that the seed and the number of prompts decide."""
    generator = random.Random(f"{seed}/held_out")
    order = sorted(((generator.random(), prompt) for prompt in sizes), key=lambda pair: pair[0])
    chosen: set[Ids] = set()
    held = 0
    for _, prompt in order:
        if held >= count:
            break
        chosen.add(prompt)
        held += sizes[prompt]
    return chosen


def _held_out(row: Preference) -> Preference:
    name = f"h{row.prompt.id[1:]}"
    candidates = tuple(replace(candidate, prompt_id=name) for candidate in row.candidates)
    return replace(row, prompt=replace(row.prompt, id=name), candidates=candidates)


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
