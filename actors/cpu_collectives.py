"""DeepSpeed's shared-memory collectives for CPUs, which it compiles when the first trainer of a machine starts."""

from pathlib import Path

import deepspeed
from deepspeed.accelerator import get_accelerator
from filelock import FileLock
from torch.utils.cpp_extension import _get_build_directory

_BUILDER = "ShareMemCommBuilder"


def load_cpu_collectives(timeout_s: float) -> None:
    """Compile and load them; nothing to do where DeepSpeed has none.

    PyTorch marks a build by a file, and waits for ever when the process that made it was killed. The lock here ends
    with its process; who holds it may take the mark away. Raises filelock.Timeout.
    """
    builder = get_accelerator().create_op_builder(_BUILDER)
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with FileLock(folder / "raylign.lock", timeout=timeout_s):
        (folder / "lock").unlink(missing_ok=True)
        builder.load()
