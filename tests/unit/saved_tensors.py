"""What autograd keeps for a backward pass, in bytes."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


class SavedTensors:
    """Unique storages kept since `start`, without those of the module's parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self._own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
        self._kept: dict[int, int] = {}

    def start(self) -> None:
        self._kept = {}

    @property
    def nbytes(self) -> int:
        return sum(self._kept.values())

    def counting(self) -> AbstractContextManager[None]:
        """Around forward passes."""
        hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)
        return hooks

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # What is kept lives as long as the graph, so that no two have one address.
        if storage.data_ptr() not in self._own:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor
