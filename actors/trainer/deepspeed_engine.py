"""DeepSpeed engines: their configuration, and what makes every ZeRO stage take the same steps."""

from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from actors.trainer.device_memory import tensors_in
from actors.trainer.state import Access
from actors.trainer.zero_state import ZeroState
from raylign.config.blocks import Dtype, TrainerBlock
from raylign.errors import TrainerError
from raylign.training.masters import adamw

BUCKET = 500_000_000
"""DeepSpeed's own: elements that ranks exchange at a time, at most."""
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
    if stage == 2:
        # Stage 3 does so by itself, stage 1 adds gradients up in an optimizer that cannot.
        zero["overlap_comm"] = get_accelerator().device_name() != "cpu"
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


_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def frozen_engine(module: nn.Module, config: dict[str, Any], dtype: Dtype) -> Any:
    """A DeepSpeed engine around `module` without an optimizer. Raises TrainerError as `require_dtype` does."""
    require_dtype(dtype)
    return deepspeed.initialize(model=module, config=config)[0]


class ZeroEngine:
    """A DeepSpeed engine that shares out optimizer state, gradients or weights over ranks: ZeRO stages 1 to 3."""

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        config: dict[str, Any],
        block: TrainerBlock,
        writable: Access,
    ) -> None:
        # DeepSpeed's buckets would have half a billion elements, however few are trained.
        for name in ("reduce_bucket_size", "allgather_bucket_size"):
            config["zero_optimization"][name] = min(BUCKET, max(1, sum(map(_numel, parameters.values()))))
        optimizer = adamw([parameter for parameter in module.parameters() if parameter.requires_grad], block)
        self._engine: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
        if self._engine.fp16_enabled():
            # The trainer says itself that the loss scale cannot be lowered any further.
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        self.training_module: nn.Module = self._engine
        self.module: nn.Module = self._engine.module
        self.state = ZeroState(self._engine.optimizer, parameters, writable, in_bf16=self._engine.bfloat16_enabled())

    @property
    def loss_scale(self) -> float | None:
        return float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else None

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, rate: float) -> float | None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        skipped = self._engine.skipped_steps
        with self.state.rounded():
            self._engine.step()
        return None if self._engine.skipped_steps > skipped else float(self._engine.get_global_grad_norm())

    def training_tensors(self) -> Iterator[Tensor]:
        """Of DeepSpeed's optimizer, and of the one inside it."""
        outer = self._engine.optimizer
        yield from tensors_in(vars(outer))
        yield from tensors_in(dict(outer.optimizer.state))
        yield from tensors_in([group["params"] for group in outer.optimizer.param_groups])

    def loss_scaler(self) -> Mapping[str, float]:
        if not self._engine.fp16_enabled():
            return {}
        return {name: getattr(self._engine.optimizer.loss_scaler, name) for name in _SCALER}

    def set_loss_scaler(self, state: Mapping[str, float]) -> None:
        for name, value in state.items() if self._engine.fp16_enabled() else ():
            setattr(self._engine.optimizer.loss_scaler, name, value)


def _numel(parameter: nn.Parameter) -> int:
    """Whole, also where ZeRO-3 has taken it apart."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def require_dtype(dtype: Dtype) -> None:
    """Raises TrainerError when the device does not compute in it."""
    device = get_accelerator()
    if dtype == "float16" and not device.is_fp16_supported():
        raise TrainerError("this device does not compute in float16; set model.dtype=bfloat16 or float32")
    if dtype == "bfloat16" and not device.is_bf16_supported():
        raise TrainerError("this device does not compute in bfloat16; set model.dtype=float16 or float32")
