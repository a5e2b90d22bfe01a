"""Data sets of the hub, by subset, folder and split."""

from typing import Any

import datasets

from raylign.config.blocks import PartBlock


def hub_splits(name: str, block: PartBlock) -> list[str]:
    """Splits of the hub data set `name`. Raises what `datasets` raises."""
    return list(datasets.get_dataset_split_names(name, block.subset, data_dir=block.data_dir))


def hub_split(name: str, block: PartBlock, split: str, *, streaming: bool = False) -> Any:
    """One split: a `datasets.Dataset`, an `IterableDataset` for `streaming`. Raises what `datasets` raises."""
    return datasets.load_dataset(name, block.subset, data_dir=block.data_dir, split=split, streaming=streaming)


def local_part(block: PartBlock) -> str:
    """What the config asks of a file or folder that only hub data sets have, with the cure; else empty."""
    asked = [f"{key}={value}" for key, value in (("subset", block.subset), ("data_dir", block.data_dir)) if value]
    return (
        f"{' and '.join(asked)}: for hub data sets, but the source is a file or folder here; remove it" if asked else ""
    )
