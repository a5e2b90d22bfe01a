"""The process group of the trainer ranks, and parameters that it shares out."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
from torch import Tensor, nn

from actors.trainer.bound_store import listen_on_own_address
from raylign.config.blocks import TrainerBlock

_INFERENCE_COLLECTIVES = "deepspeed_shm_comm"


def join_group(block: TrainerBlock, rank: int, address: str, port: int, *, on_gpu: bool) -> None:
    """Become rank `rank` of the group that meets at address:port."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(block.ranks),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    listen_on_own_address()
    # Half a minute of compiling at a machine's first start, for collectives that only DeepSpeed's inference calls.
    deepspeed.ops.__compatible_ops__[_INFERENCE_COLLECTIVES] = False
    # The driver's deadline is step_timeout_s: it comes first and knows which rank is silent.
    timeout = timedelta(seconds=2 * block.step_timeout_s)
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", timeout=timeout)


@contextmanager
def gathered(parameters: Sequence[nn.Parameter], writer: int | None = None) -> Iterator[None]:
    """ZeRO-3's parameters made whole; what rank `writer` changes in them lasts."""
    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=writer):
        yield


@dataclass(frozen=True, slots=True)
class Sharding:
    """Whether ranks hold parts of parameters (`zero3`); if so, every rank must make every call."""

    zero3: bool

    def loading(self, config: dict[str, Any]) -> object:
        """transformers shards while it loads a model as long as what is returned lives."""
        if not self.zero3:
            return None
        from transformers.integrations.deepspeed import HfDeepSpeedConfig  # noqa: PLC0415 - for ZeRO-3 alone

        return HfDeepSpeedConfig(config)

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
