"""Memory of a trainer rank: what PyTorch frees is kept, since the kernel clears it anew; running out is said."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raylign.errors import TrainerError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_LARGEST = (1 << 31) - 1
_TOP_PAD = 64 << 20


def keep_freed_memory() -> bool:
    """Let this process's allocator hold on to freed memory; False where the C library cannot be told (not glibc).

    All threads share one heap, which gives back only what lies free above 2 GiB at its end: no tensor gets a mapping of
    its own, which would go back to the kernel with it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_ARENA_MAX: 1, _M_TRIM_THRESHOLD: _LARGEST, _M_TOP_PAD: _TOP_PAD}
    return all([bool(mallopt(option, value)) for option, value in settings.items()])


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Running out of device or host memory inside becomes a TrainerError with the cures."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise TrainerError(
            f"{what} ran out of memory ({str(error).splitlines()[0]}); lower trainer.max_tokens_per_micro_batch or "
            "trainer.per_device_train_batch_size (raise gradient_accumulation_steps instead), set "
            "trainer.gradient_checkpointing=true, or raise trainer.zero_stage"
        ) from error
