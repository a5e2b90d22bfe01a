"""DeepSpeed's configuration, from the trainer block."""

from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from actors.trainer.deepspeed_engine import deepspeed_config, reference_config
from raylign.config.blocks import Dtype, OffloadBlock, TrainerBlock
from raylign.training import memory


def test_the_whole_configuration_by_hand() -> None:
    block = TrainerBlock(
        ranks=2,
        zero_stage=2,
        max_grad_norm=0.5,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
    )
    assert deepspeed_config(block, "bfloat16") == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "fp16": {"enabled": False, "hysteresis": 1, "min_loss_scale": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1_000_000_000,
    }


@pytest.mark.parametrize(
    ("stage", "offload", "zero"),
    [
        (1, OffloadBlock(), {"stage": 1}),
        (1, OffloadBlock(optimizer=True), {"stage": 1, "offload_optimizer": {"device": "cpu"}}),
        (3, OffloadBlock(), {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}),
        (
            3,
            OffloadBlock(optimizer=True, param=True),
            {
                "stage": 3,
                "stage3_gather_16bit_weights_on_model_save": True,
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "cpu"},
            },
        ),
    ],
)
def test_zero_stage_and_offload(stage: Any, offload: OffloadBlock, zero: dict[str, Any]) -> None:
    assert deepspeed_config(TrainerBlock(zero_stage=stage, offload=offload), "float32")["zero_optimization"] == zero


def test_on_gpus_stage_2_adds_gradients_up_while_it_goes_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_accelerator(), "device_name", lambda: "cuda")
    zero = deepspeed_config(TrainerBlock(zero_stage=2), "bfloat16")["zero_optimization"]
    assert zero == {"stage": 2, "overlap_comm": True}


@pytest.mark.parametrize(("dtype", "on"), [("float32", []), ("bfloat16", ["bf16"]), ("float16", ["fp16"])])
def test_each_dtype_has_its_engine(dtype: Dtype, on: list[str]) -> None:
    for config in (deepspeed_config(TrainerBlock(), dtype), reference_config(dtype, zero_stage=0)):
        assert [name for name in ("bf16", "fp16") if config[name]["enabled"]] == on


def test_float16_never_runs_the_plain_engine() -> None:
    """Its loss scale would divide gradients of a loss that was not multiplied by it."""
    stages: tuple[Any, ...] = (0, 1, 2, 3)
    found = [deepspeed_config(TrainerBlock(zero_stage=stage), "float16") for stage in stages]
    assert [config["zero_optimization"]["stage"] for config in found] == [1, 1, 2, 3]
    assert all(config["data_types"] == {"grad_accum_dtype": "fp32"} for config in found)


@pytest.mark.parametrize(("stage", "sharded"), [(0, 0), (1, 0), (2, 0), (3, 3)])
def test_the_reference_has_no_optimizer_and_is_sharded_by_zero_3_alone(stage: int, sharded: int) -> None:
    assert reference_config("bfloat16", zero_stage=stage) == {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": sharded},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "steps_per_print": 1_000_000_000,
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_is_worked_out_with_deepspeeds_own_sizes(stage: int) -> None:
    """The configuration leaves them as they are; engines of fewer weights take smaller buckets."""
    zero = DeepSpeedZeroConfig(**deepspeed_config(TrainerBlock(zero_stage=stage), "bfloat16")["zero_optimization"])
    assert (zero.reduce_bucket_size, zero.max_live_parameters) == (memory.BUCKET, memory.LIVE)
