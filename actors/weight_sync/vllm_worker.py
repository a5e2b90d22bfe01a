"""The part of weight sync that runs inside vLLM's worker processes.

vLLM imports this module in every worker because `WorkerExtension` is named as its `worker_extension_cls`; the import
registers our engines before the model loads, and keeps the workers' process group on its own address. That needs
raylign on PYTHONPATH only, not installed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.trainer.bound_store import listen_on_own_address
from actors.weight_sync.cuda_handles import from_plain
from actors.weight_sync.folder import BACKEND, IPC_BACKEND

WORKER_EXTENSION = f"{__name__}.WorkerExtension"


@dataclass
class ShmInit(WeightTransferInitInfo):
    """Nothing to agree on: the path travels with each update."""


@dataclass
class ShmUpdate(WeightTransferUpdateInfo):
    """A safetensors file with every parameter under its checkpoint name."""

    path: str


def _repack_output_heads(model: torch.nn.Module) -> None:
    """Rebuild the packed CPU copy of every output head.

    A tied head loads no tensor of its own, so vLLM's reload leaves its packed copy holding the old embedding.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


class ShmEngine(WeightTransferEngine[ShmInit, ShmUpdate]):
    """Loads weights from a memory-mapped safetensors file on this node."""

    init_info_cls = ShmInit
    update_info_cls = ShmUpdate

    def init_transfer_engine(self, init_info: ShmInit) -> None:
        return

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ShmUpdate) -> None:
        self.model.load_weights(_tensors(update_info.path))  # type: ignore[operator]

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_output_heads(self.model)

    def shutdown(self) -> None:
        return


class PlainIpcEngine(IPCWeightTransferEngine):
    """vLLM's engine for CUDA's handles, which come in plain values: vLLM itself would have to unpickle them."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        handles = {gpu: from_plain(handle) for gpu, handle in update_dict["ipc_handles"].items()}
        info: IPCWeightTransferUpdateInfo = super().parse_update_info(update_dict | {"ipc_handles": handles})
        return info


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            yield name, file.get_tensor(name)


class WorkerExtension:
    """Mixed into vLLM's worker; importing it is what registers the engines."""


WeightTransferEngineFactory.register_engine(BACKEND, ShmEngine)
WeightTransferEngineFactory.register_engine(IPC_BACKEND, PlainIpcEngine)
listen_on_own_address()
