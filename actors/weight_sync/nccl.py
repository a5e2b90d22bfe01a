"""The trainer's side of the NCCL transport, over vLLM's native weight-transfer engine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from actors.calls import ask, ask_all
from actors.supervision.watch import get_all
from raylign.errors import WeightSyncError
from raylign.roles import Generator
from raylign.training.weights import Gather, ShapeOf, checkpoint_shapes, checkpoint_weights


@dataclass(frozen=True, slots=True)
class GeneratorClient:
    """vLLM's control-plane protocol over our generator actors, every call with a deadline."""

    handles: Sequence[ActorHandle[Generator]]
    timeout_s: float

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offset = init_info["rank_offset"]
        each = (init_info["world_size"] - offset) // len(self.handles)
        infos = [init_info | {"rank_offset": offset + index * each} for index in range(len(self.handles))]
        pairs = zip(self.handles, infos, strict=True)
        refs = [ask(handle, Generator.init_weight_transfer_engine, info) for handle, info in pairs]
        get_all(refs, self.timeout_s, "joining the NCCL group", WeightSyncError)

    def start_weight_update(self) -> None:
        refs = ask_all(self.handles, Generator.start_weight_update)
        get_all(refs, self.timeout_s, "beginning a weight update", WeightSyncError)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        refs = ask_all(self.handles, Generator.update_weights, update_info)
        get_all(refs, self.timeout_s, "updating weights", WeightSyncError)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        refs = ask_all(self.handles, Generator.finish_weight_update, weight_version)
        get_all(refs, self.timeout_s, "ending a weight update", WeightSyncError)


class PolicySource(WeightSource):
    """The policy's merged weights under their checkpoint names, for plain and ZeRO-3 models alike."""

    def __init__(self, model: nn.Module, gather: Gather, shape_of: ShapeOf) -> None:
        self._model, self._gather, self._shape_of = model, gather, shape_of

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, dtype, shape) for name, dtype, shape in checkpoint_shapes(self._model, self._shape_of)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return checkpoint_weights(self._model, self._gather)


def open_sender(
    source: PolicySource,
    handles: Sequence[ActorHandle[Generator]],
    *,
    rank: int,
    address: str,
    port: int,
    workers: int,
    timeout_s: float,
) -> TrainerWeightTransferEngine[Any]:
    """Join `workers` engine workers in one NCCL group with rank 0 as the sender; call it on every trainer rank."""
    info = NCCLTrainerInitInfo(address, port, 1 + workers, rank=rank)
    return WeightTransferTrainerFactory.trainer_init(info, client=GeneratorClient(handles, timeout_s), source=source)
