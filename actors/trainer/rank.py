"""One DeepSpeed rank: what a trainer does."""

import functools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from torch import Tensor, nn

from actors.supervision.processes import enable_stack_dumps
from actors.trainer.actor import TrainerSpec, free_address
from actors.trainer.deepspeed_engine import MIN_LOSS_SCALE, deepspeed_config
from actors.trainer.device_memory import DeviceMemory, apart_from, module_tensors
from actors.trainer.engine import training_engine
from actors.trainer.host_memory import keep_freed_memory, memory_errors
from actors.trainer.process_group import Sharding, join_group
from actors.trainer.reference_policy import FrozenCopy, ReferencePolicy, checkpointed, frozen_copy, references
from actors.trainer.state import (
    StoredTensors,
    TrainerState,
    drain,
    load_tensors,
    read_state,
    state_nbytes,
    state_tensors,
    store,
    write_adapter,
    write_state,
    write_weights,
)
from raylign.config.losses import TrainerLoss
from raylign.config.reference import NoReferenceBlock
from raylign.errors import TrainerError
from raylign.losses import LossState
from raylign.records import Completions, Preference, ReferenceLogps, TokenLogps
from raylign.reference.versions import is_new_reference, reference_version
from raylign.roles import DeviceLink, Generator, TrainerRank
from raylign.run.checkpoints import Metrics
from raylign.run.sources import take_code
from raylign.training.batches import BatchShape, MicroBatch, Passes, Step, plan_steps
from raylign.training.layout_check import supported_layout
from raylign.training.learners import Totals, learner_of
from raylign.training.logprobs import CompletionScores
from raylign.training.pieces import add_gradients, of_policy, score
from raylign.training.preferences import (
    PreferenceBatch,
    in_passes,
    pass_cost,
    passes_of,
    preference_batch,
    require_logps,
    to_device,
    token_values,
    with_means,
    without_kl_samples,
)
from raylign.training.schedule import Schedule, steps_per_round
from raylign.training.sequences import Layout, token_batch

if TYPE_CHECKING:
    from actors.weight_sync.device import WeightSender

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Round:
    """The round in training: its preferences, every step's micro-batches, the reports of the steps done."""

    index: int
    preferences: tuple[Preference, ...]
    steps: list[Step]
    reports: list[Metrics]


class DeepSpeedRank:
    """Holds the model in training, its optimizer state and the reference; constructing it joins the process group.

    `raylign.roles.TrainerRank` tells of its methods.
    """

    def __init__(self, spec: TrainerSpec, rank: int, address: str, port: int) -> None:
        self._spec, self._rank = spec, rank
        self._device = torch.device("cuda", 0) if spec.on_gpu else torch.device("cpu")
        self._steps_done, self._round = 0, _Round(0, (), [], [])
        self._state, self._schedule = LossState(), Schedule(spec.trainer, spec.rounds)
        self._sender: WeightSender | None = None
        self._memory = DeviceMemory(self._device)
        enable_stack_dumps(spec.stacks, f"trainer-{rank}")
        take_code(spec.code, "loss.function", TrainerError)
        if not spec.on_gpu:
            keep_freed_memory()
        join_group(spec.trainer, rank, address, port, on_gpu=spec.on_gpu)
        self._sharding = Sharding(spec.trainer.zero_stage == 3)
        self._loading = self._sharding.loading(deepspeed_config(spec.trainer, spec.model.dtype))
        self._learner = learner_of(spec.loss, spec.folder, spec.model, spec.seed, self._sharding.writable)
        self._model = checkpointed(self._learner.model, spec.trainer)
        trained, writable = self._trained(), self._sharding.writable
        self._engine = training_engine(
            self._learner.module(), trained, spec.trainer, spec.model.dtype, self._device, writable
        )
        self._engine.module.train()
        block = spec.reference if self._learner.has_reference else NoReferenceBlock()
        frozen = functools.partial(frozen_copy, spec)
        self._references = references(block, self._model, self._engine.module, self._sharding, frozen)
        self._layout = self._supported_layout()
        self._passes = Passes(self._layout, spec.pad_id, self._device)
        torch.set_num_threads(spec.threads)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    def _supported_layout(self) -> Layout:
        """Holds for a second model too, which may be of another architecture."""
        policy: Any = self._engine.module
        reference = self._references.reference
        copies = [reference.scored] if isinstance(reference, FrozenCopy) else []
        return supported_layout([policy, *copies], self._spec.trainer.packing, self._device)

    def layout(self) -> Layout:
        return self._layout

    def ready(self) -> int:
        return os.getpid()

    def reference_candidates(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int
    ) -> dict[int, ReferenceLogps]:
        if self._references.reference is None:
            raise TrainerError("reference log-probs are asked, but this rank has no reference")
        found: dict[int, ReferenceLogps] = {}
        self._references.follow(rounds_done)
        by_token = self._spec.loss.needs_reference_tokens
        with self._references.reference.scoring() as module, torch.no_grad():
            for micro, mine in self._micro_batches(preferences, seed):
                batch = self._batch([replace(one, reference_logps=()) for one in mine], micro)
                scores = of_policy(score(module, batch))
                own, _ = without_kl_samples(batch, scores)
                sums, kl_logps = iter(own.logps.tolist()), self._kl_logps(module, batch, scores, mine)
                tokens = token_values(own.tokens.logps, mine) if by_token else [()] * len(mine)
                for place, (index, weight) in enumerate(zip(micro.indices, micro.weights, strict=True)):
                    of_candidates = tuple(next(sums) for _ in mine[place].candidates)
                    measured = ReferenceLogps(of_candidates, kl_logps[place], tokens[place])
                    found |= {index: measured} if weight else {}
        return found

    def old_logprobs(self, preferences: Sequence[Preference], seed: int) -> dict[int, tuple[tuple[float, ...], ...]]:
        if steps_per_round(len(preferences), self._spec.trainer) == 1:
            return {}
        found: dict[int, tuple[tuple[float, ...], ...]] = {}
        with self._without_training() as module:
            for micro, mine in self._micro_batches(preferences, seed):
                batch = self._batch(mine, micro)
                own, _ = without_kl_samples(batch, of_policy(score(module, batch)))
                of_each = zip(micro.indices, micro.weights, token_values(own.tokens.logps, mine), strict=True)
                found |= {index: tokens for index, weight, tokens in of_each if weight}
        return found

    @contextmanager
    def _without_training(self) -> Iterator[nn.Module]:
        """The policy's module for passes that no step is taken from."""
        self._engine.module.eval()
        with torch.no_grad():
            yield self._engine.module
        self._engine.module.train()

    def _micro_batches(
        self, preferences: Sequence[Preference], seed: int
    ) -> Iterator[tuple[MicroBatch, list[Preference]]]:
        """This rank's micro-batches of the first epoch."""
        for step in self._plan(preferences, seed, epochs=1):
            for micro in self._mine(step):
                yield micro, [preferences[index] for index in micro.indices]

    def _kl_logps(
        self, module: nn.Module, batch: PreferenceBatch, scores: CompletionScores, mine: Sequence[Preference]
    ) -> Sequence[float | None]:
        """Of the KL samples of a micro-batch, where the loss asks for them."""
        if batch.kl_samples is not None:
            return list(scores.logps[batch.kl_samples.samples].tolist())
        if self._spec.loss.needs_kl_baseline:
            return list(self._passes.kl_logps(module, mine).tolist())
        return [None] * len(mine)

    def _batch(self, preferences: Sequence[Preference], micro: MicroBatch) -> PreferenceBatch:
        loss, version = self._spec.loss, reference_version(self._spec.reference, self._references.followed)
        form, limit = (self._layout, self._spec.pad_id), self._spec.trainer.max_tokens_per_micro_batch
        batch = preference_batch(preferences, micro.weights, *form, loss.tail_weight, version, loss.needs_kl_gradient)
        return to_device(in_passes(batch, preferences, *form, limit, micro.passes), self._device)

    def _plan(self, preferences: Sequence[Preference], seed: int, epochs: int) -> list[Step]:
        block = self._spec.trainer
        layout, limit, loss = self._layout, block.max_tokens_per_micro_batch, self._spec.loss
        costs = [pass_cost(preference, layout, loss) for preference in preferences]
        passes = [passes_of(preference, layout, limit, loss) for preference in preferences]
        shape = BatchShape(block.ranks, block.train_batch_size, block.per_device_train_batch_size, limit)
        return plan_steps(costs, shape, epochs=epochs, seed=seed, passes=passes)

    def reference_logprobs(self, rows: Sequence[Completions]) -> TokenLogps:
        return self._logprobs(self._references.reference, rows)

    def initial_logprobs(self, rows: Sequence[Completions]) -> TokenLogps:
        return self._logprobs(self._references.initial, rows)

    def _logprobs(self, policy: ReferencePolicy | None, rows: Sequence[Completions]) -> TokenLogps:
        if policy is None:
            return []
        with policy.scoring() as module:
            return self._passes.logprobs(module, rows, self._rank, self._spec.trainer)

    def policy_logps(self, rows: Sequence[Completions]) -> list[list[float]]:
        with self._without_training() as module:
            return self._passes.logps(module, rows, self._rank, self._spec.trainer)

    def take_loss(self, loss: TrainerLoss) -> None:
        self._learner.take_loss(loss)

    def begin_round(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int, steps: Sequence[Metrics]
    ) -> int:
        plan = self._plan(preferences, seed, self._spec.trainer.num_train_epochs)
        require_logps(preferences, self._spec.loss, len(plan))
        self._references.follow(rounds_done)
        if self._spec.loss.needs_reward_shift and not steps and is_new_reference(self._spec.reference, rounds_done):
            means = self._measured(preferences, plan[:1], self._state)[0]
            self._state = self._learner.under_new_reference(self._state, means)
        self._round = _Round(rounds_done + 1, tuple(preferences), plan, list(steps))
        return len(plan)

    def evaluate(self, preferences: Sequence[Preference]) -> tuple[Metrics, dict[int, tuple[float, float, float]]]:
        require_logps(preferences, self._spec.loss)
        plan = self._plan(preferences, seed=0, epochs=1)
        state = self._with_means(preferences, preferences)
        return self._measured(preferences, plan, self._with_kl(state, preferences, plan))

    def _measured(
        self, preferences: Sequence[Preference], steps: Sequence[Step], state: LossState
    ) -> tuple[Metrics, dict[int, tuple[float, float, float]]]:
        """What `evaluate` returns, of the preferences of `steps`."""
        columns: list[Tensor] = []
        totals: list[Totals] = []
        mine = [micro for step in steps for micro in self._mine(step)]
        with self._without_training() as module:
            for micro in mine:
                batch = self._batch([preferences[index] for index in micro.indices], micro)
                loss, own = self._learner.measure(score(module, batch), batch, state)
                totals.append(own)
                columns.append(torch.stack([loss.losses, loss.chosen_rewards, loss.rejected_rewards]))
        places = [pair for micro in mine for pair in zip(micro.indices, micro.weights, strict=True)]
        of_each = zip(places, torch.cat(columns, 1).T.tolist(), strict=True)
        found = {index: (values[0], values[1], values[2]) for (index, weight), values in of_each if weight}
        return self._metrics(totals, tuple(loss.metrics)), found

    def _with_kl(self, state: LossState, preferences: Sequence[Preference], steps: Sequence[Step]) -> LossState:
        """With the KL of the policy as it is, estimated over all of `steps` and all ranks, where the loss reads it."""
        if not self._spec.loss.needs_kl_baseline:
            return state
        micro_batches = (micro for step in steps for micro in self._mine(step))
        with self._without_training() as module:
            totals = self._passes.kl_totals(module, preferences, micro_batches)
        dist.all_reduce(totals)
        return replace(state, kl=max(0.0, (totals[0] / totals[1]).item()))

    def _with_means(self, step: Sequence[Preference], whole_round: Sequence[Preference]) -> LossState:
        return with_means(self._state, step, whole_round, self._spec.max_completion_tokens)

    def _metrics(self, totals: Sequence[Totals], own: Sequence[str]) -> dict[str, float]:
        """Of all ranks; `own` are the names of what the loss logs itself."""
        mine = Totals.of_all(totals)
        dist.all_reduce(mine.sums)
        if mine.highest.numel():
            dist.all_reduce(mine.highest, dist.ReduceOp.MAX)
        return dict(self._learner.metrics(mine.on_host(), own))

    def train_step(self) -> Metrics:
        number = len(self._round.reports)
        # Dropout, where a model has it, draws the same whether or not earlier steps ran in this process.
        torch.manual_seed((self._spec.seed * 1_000_003 + self._steps_done) * self._spec.trainer.ranks + self._rank)
        with memory_errors(f"step {number + 1} on rank {self._rank}", self._model, self._spec):
            report = self._step(self._round.preferences, self._round.steps[number])
        self._round.reports.append(report)
        return report

    def step_indices(self, number: int) -> tuple[int, ...]:
        return self._round.steps[number].indices()

    def _step(self, preferences: Sequence[Preference], step: Step) -> dict[str, float]:
        place = self._round.index - 1 + len(self._round.reports) / len(self._round.steps)
        rate = self._schedule.rate(self._steps_done, place)
        state = self._with_means([preferences[i] for i in step.indices()], preferences)
        self._state = self._with_kl(state, preferences, [step])
        report = self._accumulate(preferences, step) | {"learning_rate": rate}
        scale = self._engine.loss_scale
        norm = self._engine.step(rate)
        if norm is None:
            scaling = scale is not None and scale > MIN_LOSS_SCALE and math.isfinite(report["loss"])
            return report | {"skipped_steps": 1.0} | ({} if scaling else {"non_finite_steps": 1.0})
        self._steps_done += 1
        self._state = self._learner.next_state(self._state, report)
        return report | {"grad_norm": norm} | ({} if scale is None else {"skipped_steps": 0.0})

    def _accumulate(self, preferences: Sequence[Preference], step: Step) -> dict[str, float]:
        """Forward and backward over this rank's micro-batches; the metrics are those of all ranks."""
        mine = self._mine(step)
        totals: list[Totals] = []
        for number, micro in enumerate(mine):
            batch = self._batch([preferences[index] for index in micro.indices], micro)
            last = number == len(mine) - 1
            loss, own = add_gradients(self._engine, self._learner, batch, self._state, step, last=last)
            totals.append(own)
        return self._metrics(totals, tuple(loss.metrics))

    def _mine(self, step: Step) -> tuple[MicroBatch, ...]:
        return step.micro_batches[self._rank]

    def token_logps(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        if self._rank > 0 and not self._sharding.zero3:
            return []
        rows = [Completions(ids[:1], (ids[1:],)) for ids in token_ids]
        batch = token_batch(rows, self._layout, self._spec.pad_id).to(self._device)
        with torch.no_grad():
            logps: Tensor = self._engine.module(batch).tokens.logps
        return [part.tolist() for part in torch.split(logps, [len(ids) - 1 for ids in token_ids])]

    def save_weights(self, path: str) -> None:
        write_weights(self._model, self._sharding, self._rank, Path(path))

    def save_adapter(self, folder: str) -> None:
        write_adapter(self._model, self._sharding, self._rank, Path(folder))

    def state_bytes(self) -> int:
        exported = sum(p.nbytes for p in self._model.parameters()) if self._spec.model.lora is None else 0
        kept = sum(tensor.nbytes for _, tensor in self._references.tensors())
        return state_nbytes(self._engine.state) * 4 // 3 + exported + kept

    def save_state(self, folder: str, round_index: int) -> list[Metrics]:
        reports = self._round.reports if self._round.index == round_index else []
        tensors = chain(state_tensors(self._engine.state), self._references.tensors())
        if self._rank > 0:
            drain(tensors)
            return reports
        store(Path(folder), tensors)
        followed, scaler = self._references.followed, dict(self._engine.loss_scaler())
        state = TrainerState(self._steps_done, followed, self._state, self._schedule.warm_at, scaler)
        write_state(Path(folder), state)
        return reports

    def load_state(self, folder: str) -> None:
        stored, state = StoredTensors(Path(folder)), read_state(Path(folder))
        load_tensors(self._engine.state, stored, state.steps_done)
        self._references.load(stored.get, state.followed)
        self._steps_done = state.steps_done
        self._state, self._schedule.warm_at = state.loss, state.warm_at
        self._engine.set_loss_scaler(state.loss_scaler)

    def offload(self, *, keep_weights: bool) -> None:
        self._memory.offload(self._without_weights() if keep_weights else None)

    def reload(self, *, weights_alone: bool) -> None:
        with memory_errors(f"coming back to the GPU of rank {self._rank}", self._model, self._spec):
            self._memory.reload(but=self._without_weights() if weights_alone else ())

    def _without_weights(self) -> list[Tensor]:
        """What only training needs, and the reference's weights: the policy scores without them."""
        reference = self._references.reference
        copy = module_tensors(reference.scored) if isinstance(reference, FrozenCopy) else ()
        return apart_from(module_tensors(self._engine.module), (*self._engine.training_tensors(), *copy))

    def free_address(self) -> tuple[str, int]:
        return free_address()

    def send_weights(
        self,
        link: DeviceLink,
        handles: Sequence[ActorHandle[Generator]],
        address: str,
        port: int,
        workers: int,
        timeout_s: float,
    ) -> None:
        from actors.weight_sync.device import PolicySource, WeightSender  # noqa: PLC0415 - vLLM, for GPUs alone

        if self._sender is None:
            source = PolicySource(self._model, self._sharding.gather, self._sharding.shape_of)
            self._sender = WeightSender(source, self._rank, timeout_s)
        self._sender.send(link, handles, address, port, workers)


_: type[TrainerRank] = DeepSpeedRank
