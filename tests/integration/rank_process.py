"""A process of a group of trainer ranks for tests; `tests.integration.ranks` starts it."""

import gc
from itertools import combinations

from raylign.boundary.imports import lean_imports

with lean_imports():
    import peft  # noqa: F401
    from deepspeed.accelerator import get_accelerator

    from actors.trainer.device_memory import storages
    from actors.trainer.rank import DeepSpeedRank
    from actors.trainer.reference_policy import FrozenCopy

from actors.trainer.actor import TrainerSpec
from raylign.training.sequences import Layout

_SMALLEST = 4096
"""Bytes of a tensor that leaves the device; those of tiny models are smaller than others'."""


class Process(DeepSpeedRank):
    """A process of a group of fixed size that is made one trainer rank after another."""

    def __init__(self) -> None:
        """Empty until `become`."""
        self._checked: set[object] = set()

    def become(self, spec: TrainerSpec, rank: int, address: str, port: int) -> None:
        # What DeepSpeed keeps of the rank before is no tensor of this one, and nobody looks for it among a million.
        self.__dict__ = {"_checked": self._checked}
        gc.collect()
        gc.freeze()
        # DeepSpeed asks for CPUs that oneDNN computes float16 on; for tests torch's own kernels do.
        get_accelerator().is_fp16_supported = lambda: True
        DeepSpeedRank.__init__(self, spec, rank, address, port)
        self._memory.smallest = _SMALLEST

    def _supported_layout(self) -> Layout:
        """The start check, for every two settings that it depends on together: it takes as long as a round of a test.

        Padded, it also decides which attention rows take.
        """
        model, trainer = self._spec.model, self._spec.trainer
        settings = {
            "architecture": self._model.config.model_type,
            "module": type(self._engine.module),
            "dtype": model.dtype,
            "adapter": model.lora is not None,
            "4 bits": model.load_in_4bit,
            "layout": trainer.packing,
            "sharded": self._sharding.zero3,
            "checkpointing": trainer.gradient_checkpointing,
            "copy": isinstance(self._references.reference, FrozenCopy),
        }
        pairs = set(combinations(settings.items(), 2))
        if pairs <= self._checked:
            return trainer.packing
        layout = super()._supported_layout()
        if layout == trainer.packing != "padded":
            self._checked |= pairs
        return layout

    def held_bytes(self) -> int:
        """What the tensors of this rank take that could be moved away."""
        held = (storage.nbytes() for _, storage in storages(self._memory.held()))
        return sum(nbytes for nbytes in held if nbytes >= _SMALLEST)

    def set_loss_scale(self, scale: float) -> None:
        self._engine.set_loss_scaler({"cur_scale": scale})
