"""The roles of a run: who passes its records on. Recipes are typed against them; Ray and its libraries are in `actors`.

`Generators`, `Trainers`, `Scorer` and `Publisher` are what a recipe holds. `Generator`, `TrainerRank` and
`ScorerProcess` are one process behind them each: drivers pass their methods to `actors.calls`, which sends the call.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:  # processes that only name a role load neither torch nor the rest
    from raylign.config.losses import TrainerLoss
    from raylign.evaluation.held_out import HeldOut
    from raylign.records import Candidate, Completions, Preference, Prompt, ReferenceLogps, Score, TokenLogps
    from raylign.run.checkpoints import Checkpoint, Metrics
    from raylign.sampling.decoding import Decoding
    from raylign.scoring.base import ScoringItem
    from raylign.scoring.usage import Usages
    from raylign.training.sequences import Layout

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NodePath:
    """A file or folder that several nodes have: at `path`, or where `elsewhere` says for Ray's id of a node."""

    path: str
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def inside(self, name: str) -> NodePath:
        """The file `name` in the folder."""
        return NodePath(f"{self.path}/{name}", {node: f"{path}/{name}" for node, path in self.elsewhere.items()})


DeviceLink = Literal["nccl", "ipc"]
"""How weights go from GPU to GPU: broadcast over NCCL to other GPUs, or by CUDA's memory handles on the same ones."""


class Generator(Protocol):
    """One engine, which samples candidates and serves one policy version at a time."""

    async def ready(self) -> None:
        """Label the base weights version 0, and open the way for others."""

    async def label(self, version: int) -> None:
        """Name the served weights."""

    async def sample(self, prompt: Prompt, decoding: Decoding, seed: int, version: int) -> list[Candidate]:
        """K candidates of one prompt, in index order. Raises GeneratorError when another version sampled them.

        The last `reference_generations` are those of the base model without the policy's adapter, at the same time.
        """
        ...

    async def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability (nats) of token_ids[1:] given their prefix, under the served weights."""
        ...

    async def pause(self) -> None:
        """Let requests in flight finish, then hold new ones."""

    async def resume(self) -> None:
        """Forget prefixes computed with older weights, then serve again."""

    async def take_adapter(self, folder: NodePath, version: int) -> None:
        """Serve the PEFT adapter in `folder` as `version`, replacing the one before."""

    async def take_weights(self, file: NodePath, version: int) -> None:
        """Serve the weights in the safetensors `file` as `version`."""

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """vLLM's weight transfer, step by step: open it (anew, if it is open), begin, receive, end."""

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None: ...

    async def finish_weight_update(self, weight_version: str | None = None) -> None: ...

    async def sleep(self, level: Literal[1, 2]) -> None:
        """Leave the GPU; at level 1 the weights are kept in main memory, at level 2 they are gone."""

    async def wake_up(self, tags: Sequence[str]) -> None:
        """Take the GPU's memory for `weights`, `kv_cache` or both again."""

    async def version(self) -> int:
        """The policy version the engine serves."""
        ...

    async def shutdown(self) -> None:
        """End the engine's processes."""


class TrainerRank(Protocol):
    """One rank of the trainers. Every rank must get every call: their collectives need all of them."""

    def layout(self) -> Layout:
        """How sequences are laid out: trainer.packing, or `padded` where an architecture cannot be packed."""
        ...

    def ready(self) -> int:
        """The process id, once the group has formed."""
        ...

    def reference_candidates(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int
    ) -> dict[int, ReferenceLogps]:
        """What the reference says of this rank's preferences, by index.

        Runs the micro-batches of the first epoch of training with the same seed, so that a policy equal to the
        reference gets bit-equal log-probs there: the loss of its first step is ln 2 exactly.
        """
        ...

    def old_logprobs(self, preferences: Sequence[Preference], seed: int) -> dict[int, tuple[tuple[float, ...], ...]]:
        """Log-probs of this rank's preferences under the policy as it is, by index, candidate and token.

        Empty where the round takes one step, whose own forward pass gives them. Runs the micro-batches of the first
        epoch, as `reference_candidates` does: the importance ratios of its first step are 1 exactly.
        """
        ...

    def reference_logprobs(self, rows: Sequence[Completions]) -> TokenLogps:
        """Log-probs of the completions of this rank's share `rows[rank::world]` under the reference.

        Empty where there is no reference to ask.
        """
        ...

    def initial_logprobs(self, rows: Sequence[Completions]) -> TokenLogps:
        """The same under the policy before round 1, which is an adapter's base; empty without an adapter."""
        ...

    def policy_logps(self, rows: Sequence[Completions]) -> list[list[float]]:
        """The same under the policy as it is, summed over tokens."""
        ...

    def take_loss(self, loss: TrainerLoss) -> None:
        """Train by it from the next round on: the one that the rank started with, but for its beta and weights."""

    def begin_round(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int, steps: Sequence[Metrics]
    ) -> int:
        """Plan the optimizer steps of a round and return their number; a checkpoint has done `steps` of them."""
        ...

    def evaluate(self, preferences: Sequence[Preference]) -> tuple[Metrics, dict[int, tuple[float, float, float]]]:
        """Metrics over all ranks, and loss and rewards of the best and worst candidate of this rank's, by index.

        Nothing that training goes on from is changed.
        """
        ...

    def train_step(self) -> Metrics:
        """The next optimizer step of the round; TRL's metrics of it, over all ranks.

        A step whose loss or gradient is not finite is skipped: `skipped_steps` is 1, and `non_finite_steps` too unless
        it is float16 finding its loss scale.
        """
        ...

    def step_indices(self, number: int) -> tuple[int, ...]:
        """Which preferences of the round step `number` (from 0) trains on, over all ranks."""
        ...

    def token_logps(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of ids[1:] given their prefix under the policy, for each list of ids.

        Rank 0 answers; the others have nothing to do but for ZeRO-3, where each holds a part of the weights.
        """
        ...

    def save_weights(self, path: str) -> None:
        """All ranks gather, rank 0 writes the merged weights to the safetensors file `path`."""

    def save_adapter(self, folder: str) -> None:
        """All ranks gather, rank 0 writes a PEFT adapter into `folder`."""

    def state_bytes(self) -> int:
        """Disk space of a checkpoint, at most: the state and the exported policy."""
        ...

    def save_state(self, folder: str, round_index: int) -> list[Metrics]:
        """All ranks gather, rank 0 writes what training goes on from; returns the reports of that round's steps."""
        ...

    def load_state(self, folder: str) -> None:
        """Take what `save_state` wrote, on any number of ranks and ZeRO stage. TrainerError when it does not fit."""

    def offload(self, *, keep_weights: bool) -> None:
        """Move what this rank holds on its GPU to main memory, but for the policy's weights where they are kept."""

    def reload(self, *, weights_alone: bool) -> None:
        """Move it back, or the policy's weights alone."""

    def free_address(self) -> tuple[str, int]:
        """This rank's node, and a port there that nobody listens on."""
        ...

    def send_weights(
        self, link: DeviceLink, handles: Sequence[Any], address: str, port: int, workers: int, timeout_s: float
    ) -> None:
        """Send the merged weights to the engines of exactly the generators `handles` (Ray's), `workers` processes each.

        The group of senders and engines is kept for the next call, and opened anew, at address:port, for others.
        """


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """One score per item, in order, and what that took."""

    scores: list[Score]
    usage: Usages


class ScorerProcess(Protocol):
    """One process with a loaded scorer."""

    def ready(self) -> bool:
        """True, once it has loaded."""
        ...

    def score(self, items: Sequence[ScoringItem], allowed: int) -> ScoredBatch:
        """One score per item, in order; the rest is skipped once more than `allowed` of them are unscored."""
        ...

    def gold(self, items: Sequence[ScoringItem], allowed: int) -> ScoredBatch:
        """The same by the gold scorer. Raises ScorerError where there is none."""
        ...


class Engines(Protocol):
    """Generators that are asked the same, all at once."""

    @property
    def handles(self) -> Sequence[Any]:
        """Ray's handles of those that are there."""
        ...

    def call(
        self,
        what: str,
        timeout_s: float,
        method: Callable[Concatenate[Generator, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[T]:
        """Every generator's answer, in order. Raises GeneratorError, with `what` was asked, when one fails."""
        ...


class Generators(Engines, Protocol):
    """Between publishes all generators serve the same policy version."""

    served: int
    """The policy version that was published last, or is being published."""
    pushed: bool
    """Whether weights were ever sent; until then every generator serves what it has loaded."""

    def replace_dead(self) -> None:
        """Replace generators that are dead, while nobody asks anything of them."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        seed: int,
        round_index: int,
        version: int,
        advance: Callable[[int], None],
        on_finished: Callable[[Sequence[Candidate]], None] = ...,
    ) -> list[Candidate]:
        """K candidates per prompt, prompt-major and in index order. `advance(1)` is called as each prompt finishes."""
        ...


class RoundRecord(Protocol):
    """What a round in training writes to; `raylign.run.rounds.RoundLog` is one."""

    @property
    def index(self) -> int: ...
    def step(self, number: int, metrics: Metrics) -> None: ...
    def new_checkpoint(
        self, steps: Sequence[Metrics], complete: bool, needed_bytes: int
    ) -> AbstractContextManager[Path]: ...
    def save_bad_step(self, number: int, preferences: Sequence[Preference]) -> None: ...


class Trainers(Protocol):
    """All ranks as one."""

    @property
    def handles(self) -> Sequence[Any]:
        """Ray's handles of the ranks, in order."""
        ...

    def replace_dead(self) -> None:
        """Replace ranks that are dead, while nobody asks anything of them."""

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Go on from the checkpoint, now and whenever ranks are lost; None is the model as it was loaded."""

    def reference_logprobs(self, rows: Sequence[Completions]) -> TokenLogps:
        """Log-probs of the completions of each row under the reference, in order; [] without one."""
        ...

    def initial_logprobs(self, rows: Sequence[Completions]) -> TokenLogps:
        """The same under the policy before round 1; [] where the trainers hold no adapter, whose base it is."""
        ...

    def policy_logps(self, rows: Sequence[Completions]) -> list[list[float]]:
        """The same under the policy as it is, summed over tokens."""
        ...

    def with_reference(self, preferences: Sequence[Preference], seed: int, rounds_done: int) -> tuple[Preference, ...]:
        """The preferences with log-probs of the reference and, where the loss weighs samples, of the policy as it is.

        `seed` is that of training. A reference that follows the policy takes its part of it first; `rounds_done`
        rounds of it are trained.
        """
        ...

    def take_loss(self, loss: TrainerLoss) -> None:
        """Evaluate by it, and train from the next round on: the config's, but for what the guard has raised."""

    def train_round(
        self, preferences: Sequence[Preference], seed: int, record: RoundRecord, advance: Callable[[int], None]
    ) -> list[Metrics]:
        """Train round `record.index` and save its checkpoint; returns the metrics of all its steps."""
        ...

    def evaluate(self, preferences: Sequence[Preference]) -> HeldOut:
        """Loss and rewards of held-out preferences, without a step."""
        ...

    def token_logps(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of ids[1:] under the policy for each list of ids."""
        ...

    def save_weights(self, path: str) -> None:
        """Write the merged weights to a safetensors file on rank 0's node."""

    def save_adapter(self, folder: str) -> None:
        """Write a PEFT adapter into a folder on rank 0's node."""

    def send_weights(self, link: DeviceLink, handles: Sequence[Any], workers: int, timeout_s: float) -> None:
        """Send the merged weights to the engines of exactly the generators `handles`, `workers` processes each."""


class Scorer(Protocol):
    """Judges candidates; what could not be judged comes back unscored, with the reason."""

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Candidate], advance: Callable[[int], None] = ...
    ) -> list[Score]:
        """One score per candidate, in order; `advance(n)` is called when n more have one."""
        ...

    def gold(self, prompts: Sequence[Prompt], candidates: Sequence[Candidate]) -> list[Score]:
        """The same by the gold scorer, for evaluations alone; empty where there is none."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """What the last call of `score` took, by scorer: `judge/latency_mean_s`; see `scoring.usage.summary`."""
        ...


class Publisher(Protocol):
    """Brings the generators to the trainer's weights and proves it."""

    def publish(self, version: int) -> Mapping[str, float]:
        """Have generators serve `version`; the canary's gaps. After a WeightSyncError they must be started anew."""
        ...

    def verify(self) -> Mapping[str, float]:
        """The canary alone."""
        ...


class Team(Protocol):
    """The roles of an online recipe, ready."""

    @property
    def generators(self) -> Generators: ...
    @property
    def trainers(self) -> Trainers: ...
    @property
    def scorer(self) -> Scorer: ...
    @property
    def publisher(self) -> Publisher: ...
