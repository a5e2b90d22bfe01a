"""Tensors on disk: safetensors, and what the disk refuses as the error that it is."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from raylign.run.files import disk_errors


def save_tensors(tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Write the named tensors to `path`, from whatever device they are on. Raises DiskError."""
    with tensor_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors}, path, {"format": "pt"})


@contextmanager
def tensor_errors(path: Path, option: str = "run.dir") -> Iterator[None]:
    """As `disk_errors`, also for what safetensors raises where the disk refuses."""
    with disk_errors(path, option):
        try:
            yield
        except SafetensorError as error:
            # It has the number of the system's error in its text only.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
