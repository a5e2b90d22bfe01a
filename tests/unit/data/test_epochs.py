"""Which rows a round on a data set trains on."""

import pytest

from raylign.config.blocks import TrainerBlock
from raylign.config.offline import OfflineScheduleBlock
from raylign.data.split import rows_of_round, total_steps

ROWS = tuple("abcdefgh")


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_rounds_of_an_epoch_have_every_row_once(parts: int) -> None:
    rounds = [rows_of_round(ROWS, index, parts, seed=1) for index in range(1, parts + 1)]
    assert sorted(row for part in rounds for row in part) == list(ROWS)
    assert {len(part) for part in rounds} <= {len(ROWS) // parts, len(ROWS) // parts + 1}


def test_every_epoch_has_an_order_of_its_own_and_the_seed_decides() -> None:
    first, second = (rows_of_round(ROWS, index, 1, seed=1) for index in (1, 2))
    assert first != second and sorted(first) == sorted(second)
    assert first == rows_of_round(ROWS, 1, 1, seed=1) != rows_of_round(ROWS, 1, 1, seed=2)


def test_steps_are_counted_part_by_part() -> None:
    """8 rows in 3 parts are 2, 3 and 3; in batches of 2 that is 1 + 2 + 2 steps, over 2 epochs 10."""
    schedule = OfflineScheduleBlock(num_train_epochs=2, rounds_per_epoch=3)
    assert total_steps(8, schedule, TrainerBlock(per_device_train_batch_size=2)) == 10
    steps = [len(rows_of_round(ROWS, index, 3, seed=0)) for index in (1, 2, 3)]
    assert steps == [2, 3, 3]
