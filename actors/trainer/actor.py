"""The trainer: the actor that drivers name, one rank. `actors.trainer.group` runs N of them in step.

DeepSpeed is imported where it starts, so that no driver waits for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from raylign.config.blocks import ModelBlock, TrainerBlock
from raylign.config.losses import TrainerLoss
from raylign.config.reference import ReferenceBlock
from raylign.records import Preference
from raylign.run.checkpoints import Metrics
from raylign.training.sequences import Completions, Layout


@dataclass(frozen=True, slots=True)
class TrainerSpec:
    """What every rank needs to load what it trains. Made by recipes and `actors.team` from the config.

    `loss` says what that is: a policy, or a reward model, which has no reference.
    `reference_folder` is the model of `reference`, which is `folder` unless another checkpoint is named.
    """

    folder: str
    reference_folder: str
    pad_id: int
    model: ModelBlock
    trainer: TrainerBlock
    loss: TrainerLoss
    reference: ReferenceBlock
    rounds: int
    seed: int
    threads: int
    on_gpu: bool
    stacks: str


class _TrainerRank:
    """`actors.trainer.rank.DeepSpeedRank` in a process of its own; constructing it joins the process group."""

    def __init__(self, spec: TrainerSpec, rank: int, address: str, port: int) -> None:
        from actors.trainer.rank import DeepSpeedRank  # noqa: PLC0415 - DeepSpeed, on the actor's node

        self._rank = DeepSpeedRank(spec, rank, address, port)

    def layout(self) -> Layout:
        """How sequences are laid out: trainer.packing, or `padded` where an architecture cannot be packed."""
        return self._rank.layout()

    def ready(self) -> int:
        """The process id, once the group has formed."""
        return self._rank.ready()

    def reference_candidates(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int
    ) -> dict[int, tuple[float, ...]]:
        """Reference log-probs of the candidates of this rank's preferences, then of the KL sample, by index.

        Runs the micro-batches of the first epoch of `train` with the same seed, so that a policy equal to the
        reference gets bit-equal log-probs there: the loss of its first step is ln 2 exactly.
        """
        return self._rank.reference_candidates(preferences, seed, rounds_done)

    def reference_logps(self, rows: Sequence[Completions]) -> list[list[float]]:
        """Summed log-probs of the completions of this rank's share `rows[rank::world]` under the reference.

        Empty where there is no reference to ask.
        """
        return self._rank.reference_logps(rows)

    def initial_logps(self, rows: Sequence[Completions]) -> list[list[float]]:
        """The same under the policy before round 1, which is an adapter's base; empty without an adapter."""
        return self._rank.initial_logps(rows)

    def begin_round(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int, steps: Sequence[Metrics]
    ) -> int:
        """Plan the optimizer steps of a round, of which a checkpoint has done `steps`; returns how many there are."""
        return self._rank.begin_round(preferences, seed, rounds_done, steps)

    def evaluate(self, preferences: Sequence[Preference]) -> tuple[Metrics, dict[int, tuple[float, float, float]]]:
        """Metrics over all ranks, and loss and rewards of the best and worst candidate of this rank's, by index.

        Nothing that training goes on from is changed.
        """
        return self._rank.evaluate(preferences)

    def train_step(self) -> Metrics:
        """The next optimizer step of the round; TRL's metrics of it, over all ranks.

        A step whose loss or gradient is not finite is skipped: `skipped_steps` is 1, and `non_finite_steps` too unless
        it is float16 finding its loss scale.
        """
        return self._rank.train_step()

    def step_indices(self, number: int) -> tuple[int, ...]:
        """Which preferences of the round step `number` (from 0) trains on, over all ranks."""
        return self._rank.step_indices(number)

    def token_logps(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of ids[1:] given their prefix under the policy, for each list of ids; all ranks must call it.

        Rank 0 answers; the others have nothing to do but for ZeRO-3, where each holds a part of the weights.
        """
        return self._rank.token_logps(token_ids)

    def save_weights(self, path: str) -> None:
        """All ranks gather, rank 0 writes the merged weights to the safetensors file `path`."""
        self._rank.save_weights(path)

    def save_adapter(self, folder: str) -> None:
        """All ranks gather, rank 0 writes a PEFT adapter into `folder`."""
        self._rank.save_adapter(folder)

    def state_bytes(self) -> int:
        """Disk space of a checkpoint, at most: the state and the exported policy."""
        return self._rank.state_bytes()

    def save_state(self, folder: str, round_index: int) -> list[Metrics]:
        """All ranks gather, rank 0 writes what training goes on from; returns the reports of that round's steps."""
        return self._rank.save_state(folder, round_index)

    def load_state(self, folder: str) -> None:
        """Take what `save_state` wrote, on any number of ranks and ZeRO stage. TrainerError when it does not fit."""
        self._rank.load_state(folder)

    def send_nccl(
        self, handles: Sequence[ActorHandle[Any]], address: str, port: int, workers: int, timeout_s: float
    ) -> None:
        """Broadcast the merged weights to the engines; the first call opens the NCCL group at address:port."""
        self._rank.send_nccl(handles, address, port, workers, timeout_s)


TrainerRank: Any = ray.remote(_TrainerRank)
