"""Memory of a trainer rank: what PyTorch frees is kept, since the kernel clears it anew; running out is said."""

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from actors.supervision.cures import MEMORY_CURES
from actors.trainer.actor import TrainerSpec
from raylign.errors import TrainerError
from raylign.training.backbone import inner_model
from raylign.training.memory import Cure, Device, TrainerNeeds, size_of, trainer_cures

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
def memory_errors(what: str, model: nn.Module, spec: TrainerSpec) -> Iterator[None]:
    """Running out of device or host memory inside becomes a TrainerError with the three settings that help most.

    `model` is what the rank of `spec` trains.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise TrainerError(
            f"{what} ran out of memory ({str(error).splitlines()[0]}); what would help: "
            f"{'; '.join(map(str, _cures(model, spec))) or MEMORY_CURES['trainer']}"
        ) from error


def _cures(model: nn.Module, spec: TrainerSpec) -> list[Cure]:
    """As `raylign plan` counts, for micro-batches that are full."""
    weights: list[tuple[str, Any]] = list(model.named_parameters())
    # ZeRO-3 has parts of parameters, and knows their whole shapes.
    shapes = {name: tuple(weight.ds_shape if hasattr(weight, "ds_shape") else weight.shape) for name, weight in weights}
    size = size_of({name: shape for name, shape in shapes.items() if "lora_" not in name}, inner_model(model).config)
    trained = sum(math.prod(shapes[name]) for name, weight in weights if weight.requires_grad)
    device: Device = "gpu" if spec.on_gpu else "cpu"
    return trainer_cures(TrainerNeeds(size, trained, spec.model, spec.trainer, 1, None, 0, device))
