"""A rank without memory says what would help."""

import tempfile

import pytest
import torch

from actors.trainer.actor import TrainerSpec
from actors.trainer.host_memory import memory_errors
from raylign.config.blocks import ModelBlock, TrainerBlock
from raylign.config.losses import SigmoidLossBlock
from raylign.config.reference import InitialReferenceBlock
from raylign.errors import TrainerError
from tests.unit.tiny_models import tiny


def spec_of(trainer: TrainerBlock) -> TrainerSpec:
    return TrainerSpec(
        folder="model",
        reference_folder="model",
        pad_id=0,
        model=ModelBlock(),
        trainer=trainer,
        loss=SigmoidLossBlock(),
        reference=InitialReferenceBlock(),
        rounds=1,
        seed=0,
        threads=1,
        on_gpu=True,
        stacks=tempfile.gettempdir(),
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_names_three_settings_by_what_they_free(error: RuntimeError) -> None:
    spec = spec_of(TrainerBlock(max_tokens_per_micro_batch=1 << 20))
    with pytest.raises(TrainerError) as caught, memory_errors("step 3 on rank 1", tiny(), spec):
        raise error
    told, cures = str(caught.value).split("; what would help: ")
    assert told == f"step 3 on rank 1 ran out of memory ({str(error).splitlines()[0]})"
    assert cures.split(" (")[0] == "trainer.max_tokens_per_micro_batch=524288"
    assert "trainer.gradient_checkpointing=true (" in cures and cures.count("GiB less") == 3


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), memory_errors("step 3", tiny(), spec_of(TrainerBlock())):
        raise RuntimeError("shapes differ")
