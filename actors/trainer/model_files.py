"""Files of the model in training: gathered by all ranks, written by rank 0."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from actors.trainer.process_group import Sharding
from raylign.errors import TrainerError
from raylign.models.open import is_adapted
from raylign.run.files import disk_errors
from raylign.run.tensor_file import save_tensors
from raylign.training.weights import adapter_weights, checkpoint_weights


def write_weights(model: nn.Module, sharding: Sharding, rank: int, path: Path) -> None:
    """The merged weights as the safetensors file `path`; every rank must call it."""
    _write(checkpoint_weights(model, sharding.gather), sharding, rank, path)


def write_adapter(model: nn.Module, sharding: Sharding, rank: int, folder: Path) -> None:
    """The PEFT adapter, with a reward model's head, into `folder`; every rank must call it."""
    if not is_adapted(model):
        raise TrainerError("there is no adapter to save: model.lora is null")
    _write(adapter_weights(model, sharding.gather), sharding, rank, folder / "adapter_model.safetensors")
    if rank == 0:
        with disk_errors(folder):
            model.peft_config["default"].save_pretrained(str(folder))


def drain(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Take part in gathering, and keep nothing."""
    for _ in tensors:
        pass


def _write(weights: Iterator[tuple[str, Tensor]], sharding: Sharding, rank: int, path: Path) -> None:
    if rank == 0:
        save_tensors(weights, path)
    elif sharding.zero3:
        drain(weights)
