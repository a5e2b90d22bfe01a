"""Access to parameters that ZeRO-3 shares out, and to whole ones alike."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from actors.trainer.process_group import gathered


@dataclass(frozen=True, slots=True)
class Sharding:
    """Whether ranks hold parts of parameters (`zero3`); if so, every rank must make every call."""

    zero3: bool

    def gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Parameters made whole, to read."""
        return gathered(parameters) if self.zero3 else nullcontext()

    def writable(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Parameters made whole; what rank 0 writes to them lasts."""
        return gathered(parameters, writer=0) if self.zero3 else nullcontext()

    def shape_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Its whole shape."""
        return tuple(parameter.ds_shape) if self.zero3 else tuple(parameter.shape)  # type: ignore[attr-defined]

    def stored(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part, as it is stored; what is written to it counts from the next use."""
        if not self.zero3:
            return parameter.data
        # ZeRO-3 keeps small parameters whole after use; a change of their parts would not reach those.
        parameter.partition()  # type: ignore[attr-defined]
        stored: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        return stored
