"""DeepSpeed's configuration, from the trainer block. A pure function: no placeholders, nothing left to guess."""

from typing import Any

from raylign.config.blocks import Dtype, TrainerBlock

MIN_LOSS_SCALE = 1.0
"""float16's loss scale is halved by every overflow, down to this."""


def deepspeed_config(block: TrainerBlock, dtype: Dtype) -> dict[str, Any]:
    """Of ZeRO stages 1 to 3. bf16 and float16 compute keeps fp32 master weights and adds gradients up in fp32.

    float16 has its loss scale in these stages alone, and stage 1 takes the same steps as stage 0 would.
    """
    stage = max(block.zero_stage, 1)
    zero: dict[str, Any] = {"stage": stage}
    if block.offload.optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if block.offload.param:
        zero["offload_param"] = {"device": "cpu"}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        # Micro-batches hold as many preferences as fit, so the trainer says itself when a step is complete.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": block.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        # Without the check ZeRO 1 and 2 would apply gradients that are not finite.
        "bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16", "hysteresis": 1, "min_loss_scale": int(MIN_LOSS_SCALE)},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1_000_000_000,
    }


def reference_config(dtype: Dtype, *, zero_stage: int) -> dict[str, Any]:
    """A frozen model without optimizer; only ZeRO-3 shards it."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3 if zero_stage == 3 else 0},
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "steps_per_print": 1_000_000_000,
    }
