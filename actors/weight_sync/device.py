"""The trainer's side of the transports from GPU to GPU, over vLLM's own weight-transfer engines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from actors.calls import ask, ask_all
from actors.supervision.watch import get_all
from actors.weight_sync.cuda_handles import to_plain
from raylign.errors import WeightSyncError
from raylign.roles import DeviceLink, Generator
from raylign.training.weights import Gather, ShapeOf, checkpoint_shapes, checkpoint_weights


@dataclass(frozen=True, slots=True)
class GeneratorClient:
    """vLLM's control-plane protocol over our generator actors, every call with a deadline."""

    handles: Sequence[ActorHandle[Generator]]
    timeout_s: float

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        pairs = zip(self.handles, self._of_each(init_info), strict=True)
        refs = [ask(handle, Generator.init_weight_transfer_engine, info) for handle, info in pairs]
        get_all(refs, self.timeout_s, "opening the way for weights", WeightSyncError)

    def _of_each(self, init_info: dict[str, Any]) -> list[dict[str, Any]]:
        """Every engine's workers have ranks of their own in an NCCL group; CUDA's handles need none."""
        if "rank_offset" not in init_info:
            return [init_info] * len(self.handles)
        offset = init_info["rank_offset"]
        each = (init_info["world_size"] - offset) // len(self.handles)
        return [init_info | {"rank_offset": offset + index * each} for index in range(len(self.handles))]

    def start_weight_update(self) -> None:
        refs = ask_all(self.handles, Generator.start_weight_update)
        get_all(refs, self.timeout_s, "beginning a weight update", WeightSyncError)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        if isinstance(update_info, dict) and (handles := update_info.get("ipc_handles")):
            update_info = update_info | {"ipc_handles": {gpu: to_plain(handle) for gpu, handle in handles.items()}}
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


class WeightSender:
    """One trainer rank's part in sending weights; every rank must take part in every call, rank 0 sends."""

    def __init__(self, source: PolicySource, rank: int, timeout_s: float) -> None:
        self._source, self._rank, self._timeout_s = source, rank, timeout_s
        self._receivers: tuple[str, ...] = ()
        self._engine: TrainerWeightTransferEngine[Any] | None = None

    def send(
        self, link: DeviceLink, handles: Sequence[ActorHandle[Generator]], address: str, port: int, workers: int
    ) -> None:
        """To the engines of exactly these generators, `workers` processes each.

        Others than at the last call, as after a loss, get a group of their own at address:port.
        """
        receivers = tuple(handle._actor_id.hex() for handle in handles)
        if self._engine is None or receivers != self._receivers:
            self._close()
            self._engine, self._receivers = self._open(link, handles, address, port, workers), receivers
        try:
            self._engine.send_weights()
        except BaseException:
            self._close()
            raise

    def _open(
        self, link: DeviceLink, handles: Sequence[ActorHandle[Generator]], address: str, port: int, workers: int
    ) -> TrainerWeightTransferEngine[Any]:
        client = GeneratorClient(handles, self._timeout_s)
        info: NCCLTrainerInitInfo | IPCTrainerInitInfo
        match link:
            case "nccl":
                info = NCCLTrainerInitInfo(address, port, 1 + workers * len(handles), rank=self._rank)
            case "ipc":
                info = IPCTrainerInitInfo(packed=True, rank=self._rank)
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source)

    def _close(self) -> None:
        """The engines end their part when they are asked to open it anew."""
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = None
