"""The trainer: one DeepSpeed rank. `actors.trainer_group` runs N of them in step."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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

from actors.deepspeed_config import deepspeed_config, reference_config
from actors.deepspeed_engine import gradient_norm, start_engine
from actors.weight_sync.nccl import PolicySource, open_sender
from raylign.config.blocks import ModelBlock, SigmoidLossBlock, TrainerBlock
from raylign.errors import TrainerError
from raylign.losses import PairLogps, preference_loss
from raylign.models import load_policy
from raylign.records import Preference
from raylign.training import metrics
from raylign.training.batches import MicroBatch, Step, TokenPair, pad_sequences, pair_rows, plan_steps
from raylign.training.logprobs import CompletionLogps
from raylign.training.schedule import learning_rate
from raylign.training.weights import adapter_weights, checkpoint_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainerSpec:
    """What every rank needs to load the policy. Made by `actors.team` from the config."""

    folder: str
    pad_id: int
    model: ModelBlock
    trainer: TrainerBlock
    loss: SigmoidLossBlock
    total_steps: int
    seed: int
    threads: int
    on_gpu: bool


class _TrainerRank:
    """Holds the policy, its optimizer state and the reference; constructing it joins the process group."""

    def __init__(self, spec: TrainerSpec, rank: int, address: str, port: int) -> None:
        self._spec, self._rank, self._world = spec, rank, spec.trainer.ranks
        self._device = torch.device("cuda", 0) if spec.on_gpu else torch.device("cpu")
        self._steps_done = 0
        self._plain_norm: float | None = None
        self._senders: list[TrainerWeightTransferEngine[Any]] = []
        torch.set_num_threads(spec.threads)
        _join_group(spec, rank, address, port)
        config = deepspeed_config(spec.trainer, spec.model.dtype)
        # transformers shards while loading as long as this object lives.
        self._zero3 = [HfDeepSpeedConfig(config)] if spec.trainer.zero_stage == 3 else []
        self._policy = self._load(spec.model)
        self._engine = start_engine(CompletionLogps(self._policy), config)
        self._engine.train()
        self._reference = self._frozen_copy()

    def _load(self, block: ModelBlock) -> PreTrainedModel | PeftModel:
        model = load_policy(self._spec.folder, block, self._spec.seed)
        if self._spec.trainer.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def _frozen_copy(self) -> nn.Module:
        """The reference module: the policy itself under a disabled adapter, else a second copy without optimizer."""
        if isinstance(self._policy, PeftModel):
            policy: nn.Module = self._engine.module
            return policy
        copy = self._load(self._spec.model).requires_grad_(False)
        config = reference_config(self._spec.model.dtype, zero_stage=self._spec.trainer.zero_stage)
        reference: nn.Module = start_engine(CompletionLogps(copy), config)
        reference.eval()
        return reference

    def ready(self) -> int:
        """The process id, once the group has formed."""
        return os.getpid()

    def reference_pairs(self, preferences: Sequence[Preference], seed: int) -> dict[int, tuple[float, float]]:
        """Reference log-probs (chosen, rejected) of this rank's preferences, by index.

        Runs the micro-batches of the first epoch of `train` with the same seed, so that a policy equal to the
        reference gets bit-equal log-probs there: the loss of its first step is ln 2 exactly.
        """
        found: dict[int, tuple[float, float]] = {}
        with self._as_reference(), torch.no_grad():
            for micro in (micro for step in self._plan(len(preferences), seed, epochs=1) for micro in self._mine(step)):
                rows = pair_rows([preferences[index] for index in micro.indices])
                logps = self._reference(pad_sequences(rows, self._spec.pad_id).to(self._device)).logps
                pairs = zip(*(half.tolist() for half in logps.chunk(2)), strict=True)
                real = zip(micro.indices, micro.weights, pairs, strict=True)
                found |= {index: pair for index, weight, pair in real if weight}
        return found

    def _as_reference(self) -> AbstractContextManager[None]:
        return self._policy.disable_adapter() if isinstance(self._policy, PeftModel) else nullcontext()

    def _plan(self, count: int, seed: int, epochs: int) -> list[Step]:
        block = self._spec.trainer
        return plan_steps(
            count,
            ranks=self._world,
            micro_batch=block.per_device_train_batch_size,
            accumulation=block.gradient_accumulation_steps,
            epochs=epochs,
            seed=seed,
        )

    def reference_logps(self, rows: Sequence[TokenPair]) -> list[float]:
        """Summed completion log-probs of this rank's share `rows[rank::world]` under the reference."""
        with self._as_reference():
            return self._logps(self._reference, rows[self._rank :: self._world], math.ceil(len(rows) / self._world))

    def _logps(self, module: nn.Module, rows: Sequence[TokenPair], count: int) -> list[float]:
        """Every rank runs `count` rows, the last one repeated as filler, so that ZeRO-3 gathers line up."""
        filled = [*rows, *[rows[-1] if rows else ((0,), (0,))] * (count - len(rows))]
        size = 2 * self._spec.trainer.per_device_train_batch_size
        logps: list[float] = []
        with torch.no_grad():
            for start in range(0, count, size):
                chunk = pad_sequences(filled[start : start + size], self._spec.pad_id).to(self._device)
                logps += module(chunk).logps.tolist()
        return logps[: len(rows)]

    def train(self, preferences: Sequence[Preference], seed: int) -> Iterator[dict[str, float]]:
        """A round's optimizer steps; yields TRL's metrics of each, over all ranks."""
        for step in self._plan(len(preferences), seed, self._spec.trainer.num_train_epochs):
            yield self._step(preferences, step)

    def _step(self, preferences: Sequence[Preference], step: Step) -> dict[str, float]:
        rate = learning_rate(self._steps_done, self._spec.total_steps, self._spec.trainer)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        skipped = self._engine.skipped_steps
        totals = torch.stack([self._micro_step(preferences, micro, step.count) for micro in self._mine(step)]).sum(0)
        dist.all_reduce(on_device := totals.to(self._device))
        report = metrics.finish(on_device.cpu())
        if not math.isfinite(report["loss"]) or self._engine.skipped_steps > skipped:
            raise TrainerError(
                f"step {self._steps_done}: loss is {report['loss']} or its gradient overflowed; "
                f"lower trainer.learning_rate (now {rate:g}) or set model.dtype=float32"
            )
        self._steps_done += 1
        norm = self._plain_norm if self._plain_norm is not None else float(self._engine.get_global_grad_norm())
        return report | {"learning_rate": rate, "grad_norm": norm}

    def _mine(self, step: Step) -> tuple[MicroBatch, ...]:
        return step.micro_batches[self._rank]

    def _micro_step(self, preferences: Sequence[Preference], micro: MicroBatch, step_count: int) -> Tensor:
        batch = [preferences[index] for index in micro.indices]
        sequences = pad_sequences(pair_rows(batch), self._spec.pad_id).to(self._device)
        weights = torch.tensor(micro.weights, device=self._device)
        scores = self._engine(sequences)
        chosen, rejected = scores.logps.chunk(2)
        loss = preference_loss(PairLogps(chosen, rejected, *self._reference_of(batch)), self._spec.loss)
        # Ranks are averaged by DeepSpeed, so world / count makes every preference weigh 1 / count of the step.
        self._engine.backward((loss.losses * weights).sum() * self._world / step_count, scale_wrt_gas=False)
        self._plain_norm = gradient_norm(self._engine)
        self._engine.step()
        return metrics.sums(loss, scores, weights, int(sequences.attention_mask.sum()))

    def _reference_of(self, batch: Sequence[Preference]) -> tuple[Tensor, Tensor]:
        logps = torch.tensor([(p.reference_logps[0], p.reference_logps[-1]) for p in batch], device=self._device)
        return logps[:, 0], logps[:, 1]

    def token_logps(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of ids[1:] given their prefix under the policy, for each list of ids; all ranks must call it."""
        logps = []
        with torch.no_grad():
            for ids in token_ids:
                row = pad_sequences([(ids[:1], ids[1:])], self._spec.pad_id).to(self._device)
                logps.append(self._engine.module(row).token_logps.tolist())
        return logps

    def save_weights(self, path: str) -> None:
        """All ranks gather, rank 0 writes the merged weights to the safetensors file `path`."""
        weights = checkpoint_weights(self._policy, self._gather)
        if self._rank == 0:
            save_file({name: tensor.cpu().contiguous() for name, tensor in weights}, path, {"format": "pt"})
        else:
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
        else:
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
        if self._zero3:
            return _gathered(parameters)
        return nullcontext()


def _join_group(spec: TrainerSpec, rank: int, address: str, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(spec.trainer.ranks),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    deepspeed.init_distributed(
        dist_backend="nccl" if spec.on_gpu else "gloo", timeout=timedelta(seconds=spec.trainer.step_timeout_s)
    )


@contextmanager
def _gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


def _drain(weights: Iterator[tuple[str, Tensor]]) -> None:
    for _ in weights:
        pass


TrainerRank: Any = ray.remote(_TrainerRank)
