"""The trainer: one DeepSpeed rank. `actors.trainer_group` runs N of them in step."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import ray
import torch
import torch.distributed as dist
from peft import PeftModel
from ray.actor import ActorHandle
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine

from actors.deepspeed_config import MIN_LOSS_SCALE, deepspeed_config, reference_config
from actors.deepspeed_engine import frozen_engine, gradient_norm, loss_scale, training_engine
from actors.host_memory import keep_freed_memory
from actors.reference_policy import DisabledAdapter, FollowingAdapter, FollowingCopy, FrozenCopy, ReferencePolicy, pace
from actors.weight_sync.nccl import PolicySource, open_sender
from raylign.config.blocks import ModelBlock, TrainerBlock
from raylign.config.losses import LossBlock
from raylign.config.reference import ModelReferenceBlock, NoReferenceBlock, ReferenceBlock, SamplerReferenceBlock
from raylign.errors import TrainerError
from raylign.losses import LossState, next_state, preference_loss
from raylign.models import DTYPES, load_policy
from raylign.records import Preference
from raylign.training import metrics
from raylign.training.batches import BatchShape, MicroBatch, Step, plan_steps
from raylign.training.logprobs import CompletionLogps, causal_lm
from raylign.training.packing_check import packs_exactly
from raylign.training.preferences import (
    PreferenceBatch,
    candidate_logps,
    completions_of,
    preference_batch,
    to_device,
)
from raylign.training.schedule import learning_rate
from raylign.training.sequences import Completions, Layout, token_batch, token_cost
from raylign.training.weights import adapter_weights, checkpoint_weights

log = logging.getLogger(__name__)
_INFERENCE_COLLECTIVES = "deepspeed_shm_comm"
_CURE = "lower trainer.learning_rate or set model.dtype=float32"


@dataclass(frozen=True, slots=True)
class TrainerSpec:
    """What every rank needs to load the policy. Made by `actors.team` from the config.

    `reference_folder` is the model of `reference`, which is `folder` unless another checkpoint is named.
    """

    folder: str
    reference_folder: str
    pad_id: int
    model: ModelBlock
    trainer: TrainerBlock
    loss: LossBlock
    reference: ReferenceBlock
    total_steps: int
    seed: int
    threads: int
    on_gpu: bool


class _TrainerRank:
    """Holds the policy, its optimizer state and the reference; constructing it joins the process group."""

    def __init__(self, spec: TrainerSpec, rank: int, address: str, port: int) -> None:
        self._spec, self._rank = spec, rank
        self._device = torch.device("cuda", 0) if spec.on_gpu else torch.device("cpu")
        self._steps_done = 0
        self._state = LossState()
        self._senders: list[TrainerWeightTransferEngine[Any]] = []
        torch.set_num_threads(spec.threads)
        if not spec.on_gpu:
            keep_freed_memory()
        _join_group(spec, rank, address, port)
        config = deepspeed_config(spec.trainer, spec.model.dtype)
        # transformers shards while loading as long as this object lives.
        self._zero3 = [HfDeepSpeedConfig(config)] if spec.trainer.zero_stage == 3 else []
        self._policy = self._load(spec.folder, spec.model)
        self._engine = training_engine(CompletionLogps(self._policy), config, spec.trainer)
        self._engine.train()
        self._layout = self._supported_layout()
        self._references = [self._reference()] if self._needs_reference() else []

    def _load(self, folder: str, block: ModelBlock) -> PreTrainedModel | PeftModel:
        model = load_policy(folder, block, self._spec.seed)
        if self._spec.trainer.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def _supported_layout(self) -> Layout:
        wanted = self._spec.trainer.packing
        config = causal_lm(self._policy).config
        vocabulary, dtype = config.get_text_config().vocab_size, DTYPES[self._spec.model.dtype]
        if wanted == "padded" or packs_exactly(self._engine.module, vocabulary, self._device, dtype):
            return wanted
        log.warning("%s cannot be packed exactly; training on padded rows", config.model_type)
        return "padded"

    def layout(self) -> Layout:
        """How sequences are laid out: trainer.packing, or `padded` where the architecture cannot be packed."""
        return self._layout

    def _needs_reference(self) -> bool:
        """An adapter's base is a reference at no cost, so that KL can be told even where no loss reads it."""
        copied = not isinstance(self._policy, PeftModel)
        return not (copied and isinstance(self._spec.reference, SamplerReferenceBlock | NoReferenceBlock))

    def _reference(self) -> ReferencePolicy:
        block, module = self._spec.reference, self._engine.module
        follows = pace(block)
        if isinstance(self._policy, PeftModel) and not isinstance(block, ModelReferenceBlock):
            if follows is None:
                return DisabledAdapter(self._policy, module)
            return FollowingAdapter(self._policy, module, follows, self._writable)
        whole = self._spec.model.model_copy(update={"lora": None})
        copy = self._load(self._spec.reference_folder, whole).requires_grad_(False)
        config = reference_config(self._spec.model.dtype, zero_stage=self._spec.trainer.zero_stage)
        frozen: nn.Module = frozen_engine(CompletionLogps(copy), config)
        frozen.eval()
        return FrozenCopy(frozen) if follows is None else FollowingCopy(frozen, module, follows, self._stored)

    def ready(self) -> int:
        """The process id, once the group has formed."""
        return os.getpid()

    def reference_candidates(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int
    ) -> dict[int, tuple[float, ...]]:
        """Reference log-probs of the candidates of this rank's preferences, by index.

        Runs the micro-batches of the first epoch of `train` with the same seed, so that a policy equal to the
        reference gets bit-equal log-probs there: the loss of its first step is ln 2 exactly.
        """
        found: dict[int, tuple[float, ...]] = {}
        self._references[0].advance(rounds_done)
        plan = self._plan(preferences, seed, epochs=1)
        with self._references[0].scoring() as module, torch.no_grad():
            for micro in (micro for step in plan for micro in self._mine(step)):
                batch = self._batch([replace(preferences[i], reference_logps=()) for i in micro.indices], micro)
                logps = iter(module(batch.tokens, batch.token_weights).logps.tolist())
                for index, weight in zip(micro.indices, micro.weights, strict=True):
                    values = tuple(next(logps) for _ in preferences[index].candidates)
                    found |= {index: values} if weight else {}
        return found

    def _batch(self, preferences: Sequence[Preference], micro: MicroBatch) -> PreferenceBatch:
        batch = preference_batch(
            preferences, micro.weights, self._layout, self._spec.pad_id, self._spec.loss.tail_weight
        )
        return to_device(batch, self._device)

    def _plan(self, preferences: Sequence[Preference], seed: int, epochs: int) -> list[Step]:
        block = self._spec.trainer
        costs = [token_cost(completions_of(preference), self._layout) for preference in preferences]
        shape = BatchShape(
            block.ranks, block.train_batch_size, block.per_device_train_batch_size, block.max_tokens_per_micro_batch
        )
        return plan_steps(costs, shape, epochs=epochs, seed=seed)

    def reference_logps(self, rows: Sequence[Completions]) -> list[list[float]]:
        """Summed log-probs of the completions of this rank's share `rows[rank::world]` under the reference.

        Empty where there is no reference to ask.
        """
        if not self._references:
            return []
        world = self._spec.trainer.ranks
        with self._references[0].scoring() as module:
            return self._logps(module, rows[self._rank :: world], math.ceil(len(rows) / world))

    def _logps(self, module: nn.Module, rows: Sequence[Completions], count: int) -> list[list[float]]:
        """Every rank runs `count` rows, one at a time with fillers, so that ZeRO-3 gathers line up."""
        filled = [*rows, *[rows[-1] if rows else Completions((0,), ((0,),))] * (count - len(rows))]
        size = self._spec.trainer.per_device_train_batch_size
        logps: list[float] = []
        with torch.no_grad():
            for start in range(0, count, size):
                tokens = token_batch(filled[start : start + size], self._layout, self._spec.pad_id)
                logps += module(tokens.to(self._device)).logps.tolist()
        found = iter(logps)
        return [[next(found) for _ in row.completions] for row in rows]

    def train(self, preferences: Sequence[Preference], seed: int) -> Iterator[dict[str, float]]:
        """A round's optimizer steps; yields TRL's metrics of each, over all ranks."""
        for step in self._plan(preferences, seed, self._spec.trainer.num_train_epochs):
            yield self._step(preferences, step)

    def _step(self, preferences: Sequence[Preference], step: Step) -> dict[str, float]:
        rate = learning_rate(self._steps_done, self._spec.total_steps, self._spec.trainer)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._state = replace(self._state, mean_chosen_tokens=_mean_chosen_tokens(preferences, step))
        report = self._accumulate(preferences, step)
        norm, scale, skipped = gradient_norm(self._engine), loss_scale(self._engine), self._engine.skipped_steps
        self._engine.step()
        report |= {"learning_rate": rate}
        if self._engine.skipped_steps > skipped or not math.isfinite(norm or 0.0):
            self._require_scaling(scale)
            return report | {"skipped_steps": 1.0}
        self._steps_done += 1
        self._state = next_state(self._state, self._spec.loss, report)
        norm = norm if norm is not None else float(self._engine.get_global_grad_norm())
        return report | {"grad_norm": norm} | ({"skipped_steps": 0.0} if self._engine.fp16_enabled() else {})

    def _accumulate(self, preferences: Sequence[Preference], step: Step) -> dict[str, float]:
        """Forward and backward over this rank's micro-batches; the metrics are those of all ranks."""
        mine = self._mine(step)
        totals: list[Tensor] = []
        for number, micro in enumerate(mine):
            self._engine.set_gradient_accumulation_boundary(number == len(mine) - 1)
            batch = self._batch([preferences[index] for index in micro.indices], micro)
            scores = self._engine(batch.tokens, batch.token_weights)
            loss = preference_loss(candidate_logps(batch, scores), self._spec.loss, self._state)
            # Ranks are averaged by DeepSpeed, so world / count makes every preference weigh 1 / count of the step.
            total = (loss.losses * batch.weights).sum() * self._spec.trainer.ranks / step.count
            self._engine.backward(total, scale_wrt_gas=False)
            totals.append(metrics.sums(loss, scores, batch))
        dist.all_reduce(on_device := torch.stack(totals).sum(0).to(self._device))
        report = metrics.finish(on_device.cpu(), tuple(loss.metrics))
        if not math.isfinite(report["loss"]):
            raise TrainerError(f"step {self._steps_done}: loss is {report['loss']}; {_CURE}")
        return report

    def _require_scaling(self, scale: float) -> None:
        """float16 lowers its loss scale after an overflow and goes on; nothing else may overflow."""
        if scale <= MIN_LOSS_SCALE:
            raise TrainerError(f"step {self._steps_done}: the gradient overflowed at loss scale {scale:g}; {_CURE}")

    def _mine(self, step: Step) -> tuple[MicroBatch, ...]:
        return step.micro_batches[self._rank]

    def token_logps(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of ids[1:] given their prefix under the policy, for each list of ids; all ranks must call it.

        Rank 0 answers; the others have nothing to do but for ZeRO-3, where each holds a part of the weights.
        """
        if self._rank > 0 and not self._zero3:
            return []
        rows = [Completions(ids[:1], (ids[1:],)) for ids in token_ids]
        batch = token_batch(rows, self._layout, self._spec.pad_id).to(self._device)
        with torch.no_grad():
            logps: Tensor = self._engine.module(batch).tokens.logps
        return [part.tolist() for part in torch.split(logps, [len(ids) - 1 for ids in token_ids])]

    def save_weights(self, path: str) -> None:
        """All ranks gather, rank 0 writes the merged weights to the safetensors file `path`."""
        weights = checkpoint_weights(self._policy, self._gather)
        if self._rank == 0:
            save_file({name: tensor.cpu().contiguous() for name, tensor in weights}, path, {"format": "pt"})
        elif self._zero3:
            _drain(weights)

    def save_adapter(self, folder: str) -> None:
        """All ranks gather, rank 0 writes a PEFT adapter into `folder`."""
        if not isinstance(self._policy, PeftModel):
            raise TrainerError("there is no adapter to save: model.lora is null")
        weights = adapter_weights(self._policy, self._gather)
        if self._rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.cpu().contiguous() for name, tensor in weights}
            save_file(tensors, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
            self._policy.peft_config["default"].save_pretrained(folder)
        elif self._zero3:
            _drain(weights)

    def send_nccl(
        self, handles: Sequence[ActorHandle[Any]], address: str, port: int, workers: int, timeout_s: float
    ) -> None:
        """Broadcast the merged weights to the engines; the first call opens the NCCL group at address:port."""
        if not self._senders:
            source = PolicySource(self._policy, self._gather, self._shape_of)
            self._senders.append(
                open_sender(
                    source, handles, rank=self._rank, address=address, port=port, workers=workers, timeout_s=timeout_s
                )
            )
        self._senders[0].send_weights()

    def _shape_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.ds_shape) if self._zero3 else tuple(parameter.shape)  # type: ignore[attr-defined]

    def _gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return _gathered(parameters) if self._zero3 else nullcontext()

    def _writable(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return _gathered(parameters, writer=0) if self._zero3 else nullcontext()

    def _stored(self, parameter: nn.Parameter) -> Tensor:
        if not self._zero3:
            return parameter.data
        # ZeRO-3 keeps small parameters whole after use; a change of their parts would not reach those.
        parameter.partition()  # type: ignore[attr-defined]
        stored: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        return stored


def _join_group(spec: TrainerSpec, rank: int, address: str, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(spec.trainer.ranks),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    # Half a minute of compiling at a machine's first start, for collectives that only DeepSpeed's inference calls.
    deepspeed.ops.__compatible_ops__[_INFERENCE_COLLECTIVES] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if spec.on_gpu else "gloo", timeout=timedelta(seconds=spec.trainer.step_timeout_s)
    )


@contextmanager
def _gathered(parameters: Sequence[nn.Parameter], writer: int | None = None) -> Iterator[None]:
    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=writer):
        yield


def _mean_chosen_tokens(preferences: Sequence[Preference], step: Step) -> float:
    """Mean length of the best candidates of the whole step, over all ranks."""
    micro_batches = (micro for mine in step.micro_batches for micro in mine)
    real = (index for micro in micro_batches for index, w in zip(micro.indices, micro.weights, strict=True) if w)
    return sum(len(preferences[index].candidates[0].token_ids) for index in real) / step.count


def _drain(weights: Iterator[tuple[str, Tensor]]) -> None:
    for _ in weights:
        pass


TrainerRank: Any = ray.remote(_TrainerRank)
