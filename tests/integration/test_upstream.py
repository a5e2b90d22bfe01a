"""What only GPUs and clusters call of other libraries, held against the installed ones: names, parameters, answers."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec
import pytest
import ray
import torch
from ray._private.node import Node
from torch import nn
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from torch.storage import TypedStorage
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCTrainerInitInfo,
    IPCTrainerWeightTransferEngine,
    IPCWeightTransferEngine,
)
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.gpu_worker import Worker

from actors.weight_sync.cuda_handles import from_plain, to_plain
from actors.weight_sync.device import GeneratorClient, PolicySource, WeightSender
from actors.weight_sync.transports import IPC
from actors.weight_sync.vllm_worker import PlainIpcEngine

pytestmark = pytest.mark.slow

CALLS: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
    (AsyncLLM.sleep, ("level", "mode")),
    (AsyncLLM.wake_up, ("tags",)),
    (AsyncLLM.pause_generation, ("mode", "clear_cache")),
    (AsyncLLM.resume_generation, ()),
    (AsyncLLM.reset_prefix_cache, ()),
    (AsyncLLM.init_weight_transfer_engine, ("request",)),
    (AsyncLLM.shutdown_weight_transfer_engine, ()),
    (AsyncLLM.start_weight_update, ()),
    (AsyncLLM.update_weights, ("request",)),
    (AsyncLLM.finish_weight_update, ("weight_version",)),
    (AsyncLLM.update_weight_version, ("new_version",)),
    (AsyncLLM.get_weight_version, ()),
    (AsyncEngineArgs, ("enable_sleep_mode", "enforce_eager", "gpu_memory_utilization", "weight_transfer_config")),
    (WeightTransferConfig, ("backend",)),
    (WeightTransferInitRequest, ("init_info",)),
    (WeightTransferUpdateRequest, ("update_info",)),
    (WeightTransferTrainerFactory.trainer_init, ("init_info", "client", "source")),
    (NCCLTrainerInitInfo, ("master_address", "master_port", "world_size", "packed", "rank")),
    (IPCTrainerInitInfo, ("packed", "rank")),
    (TrainerWeightTransferEngine.send_weights, ()),
    (TrainerWeightTransferEngine.shutdown, ()),
    (VLLMWeightSyncClient.init_weight_transfer_engine, ("init_info",)),
    (VLLMWeightSyncClient.update_weights, ("update_info",)),
    (VLLMWeightSyncClient.finish_weight_update, ("weight_version",)),
    (Worker.sleep, ("level",)),
    (Worker.wake_up, ("tags",)),
    (torch.UntypedStorage.resize_, ()),
]


@pytest.mark.parametrize(("function", "names"), CALLS, ids=[f"{call.__qualname__}" for call, _ in CALLS])
def test_it_is_there_with_these_parameters(function: Callable[..., Any], names: Sequence[str]) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # of C functions nothing is known but that they are there
        assert not names
        return
    assert set(names) <= parameters.keys()


def test_vllm_knows_the_backends_and_the_depths_of_sleep() -> None:
    assert {"nccl", "ipc"} <= WeightTransferEngineFactory._registry.keys()
    assert {"nccl", "ipc"} <= WeightTransferTrainerFactory._registry.keys()
    source = inspect.getsource(EngineCore.wake_up)
    assert "resume_scheduler" in source and "is_sleeping" in source, "a partial wake holds requests back"
    modes = inspect.signature(AsyncLLM.sleep).parameters["mode"].annotation
    assert "wait" in get_args(modes)
    tags = inspect.getsource(Worker)
    assert '"weights"' in tags and '"kv_cache"' in tags


HANDLE = (
    *(torch.Tensor, torch.Size([6]), (1,), 0, TypedStorage, torch.uint8, 0, b"memory", 6, 0, False),
    *(b"counter", 64, b"event", True),
)
"""What PyTorch gives for six bytes on a GPU."""


def test_cudas_handles_are_plain_on_their_way() -> None:
    names = [
        *("tensor_cls", "tensor_size", "tensor_stride", "tensor_offset", "storage_cls", "dtype", "storage_device"),
        *("storage_handle", "storage_size_bytes", "storage_offset_bytes", "requires_grad", "ref_counter_handle"),
        *("ref_counter_offset", "event_handle", "event_sync_required"),
    ]
    assert list(inspect.signature(rebuild_cuda_tensor).parameters) == names
    plain = to_plain(HANDLE)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plain)) == plain, "vLLM sends it without a pickle"
    assert from_plain(plain) == HANDLE
    with pytest.raises(KeyError):
        from_plain([*plain[:5], "torch.float64", *plain[6:]])


def test_vllms_engine_gets_the_handles_as_they_were() -> None:
    engine = object.__new__(PlainIpcEngine)
    shape: dict[str, Any] = {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[3]], "tensor_sizes": [6]}
    info = engine.parse_update_info(shape | {"ipc_handles": {"GPU-1": to_plain(HANDLE)}})
    assert info.ipc_handles == {"GPU-1": HANDLE} and WeightTransferEngineFactory._registry.keys() >= {IPC.backend}
    assert '"ipc_handles": ipc_handles' in inspect.getsource(IPCTrainerWeightTransferEngine._do_send)
    assert "update_info.ipc_handles" in inspect.getsource(IPCWeightTransferEngine.receive_weights)


def test_an_nccl_group_numbers_the_sender_first() -> None:
    """`GeneratorClient` counts from the offset that vLLM's trainer sends."""
    info = NCCLWeightTransferInitInfo(master_address="a", master_port=1, rank_offset=1, world_size=5)
    payload = worker_init_payload(info)
    assert (payload["rank_offset"], payload["world_size"]) == (1, 5)
    of_each = GeneratorClient(["one", "two"], 1.0)._of_each(payload)  # type: ignore[list-item]
    assert [each["rank_offset"] for each in of_each] == [1, 3]
    assert GeneratorClient(["one"], 1.0)._of_each({"packed": True}) == [{"packed": True}]  # type: ignore[list-item]


@dataclass(frozen=True)
class Id:
    value: str

    def hex(self) -> str:
        return self.value


@dataclass(frozen=True)
class Handle:
    _actor_id: Id


@dataclass
class Opened:
    """An engine of vLLM's on the trainers' side, as the factory would give it."""

    info: Any
    client: GeneratorClient
    events: list[str] = field(default_factory=list)
    fails: bool = False

    def send_weights(self) -> None:
        self.events.append("send")
        if self.fails:
            raise RuntimeError("NCCL error")

    def shutdown(self) -> None:
        self.events.append("shutdown")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Opened]:
    found: list[Opened] = []

    def trainer_init(info: Any, *, client: GeneratorClient, source: PolicySource) -> Opened:
        found.append(Opened(info, client))
        return found[-1]

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    return found


def sender() -> WeightSender:
    return WeightSender(PolicySource(nn.Linear(2, 2), lambda _: None, lambda _: (1,)), 0, 5.0)  # type: ignore[arg-type,return-value]


def handles(*names: str) -> Any:
    return [Handle(Id(name)) for name in names]


def test_a_group_lasts_as_long_as_its_members(opened: list[Opened]) -> None:
    weights = sender()
    for receivers in (("a", "b"), ("a", "b"), ("a", "c"), ("c",), ("a", "c")):
        weights.send("nccl", handles(*receivers), "host", 5000, 2)
    assert [one.info.world_size for one in opened] == [5, 5, 3, 5]
    assert [one.events for one in opened] == [["send", "send", "shutdown"], *[["send", "shutdown"]] * 2, ["send"]]
    assert [len(one.client.handles) for one in opened] == [2, 2, 1, 2]
    assert all(isinstance(one.info, NCCLTrainerInitInfo) and one.info.packed for one in opened)


def test_a_group_that_failed_is_not_used_again(opened: list[Opened]) -> None:
    weights = sender()
    weights.send("ipc", handles("a"), "", 0, 1)
    opened[0].fails = True
    with pytest.raises(RuntimeError, match="NCCL error"):
        weights.send("ipc", handles("a"), "", 0, 1)
    weights.send("ipc", handles("a"), "", 0, 1)
    assert [one.events for one in opened] == [["send", "send", "shutdown"], ["send"]]
    assert all(isinstance(one.info, IPCTrainerInitInfo) and one.info.packed for one in opened)


def test_the_senders_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the factory makes of the two kinds of information."""
    made: list[type] = []
    for engine in (NCCLTrainerWeightTransferEngine, IPCTrainerWeightTransferEngine):
        monkeypatch.setattr(engine, "trainer_init", classmethod(lambda cls, *_, **__: made.append(cls)))
    weights = sender()
    weights._open("nccl", handles("a"), "host", 5000, 1)
    weights._open("ipc", handles("a"), "host", 5000, 1)
    assert made == [NCCLTrainerWeightTransferEngine, IPCTrainerWeightTransferEngine]


def test_what_only_watches_a_cluster_can_be_left_out() -> None:
    """What `actors.cluster` puts in place of Ray's own is asked for by these names."""
    assert "ray._private.parameter.RayParams(" in inspect.getsource(ray.init)
    head, node = inspect.getsource(Node.start_head_processes), inspect.getsource(Node.start_ray_processes)
    assert "if not self._ray_params.no_monitor" in head and "if self._ray_params.include_log_monitor" in node
    server = inspect.getsource(Node.start_api_server)
    assert "= ray._private.services.start_api_server(" in server and "if process_info is not None" in server
