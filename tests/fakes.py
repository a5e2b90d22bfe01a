"""Roles without Ray, vLLM and DeepSpeed, around a policy that is nothing but its version number.

Version v gives every token the log-probability -1 / (v + 1) nats and answers with `index + v` times "good", then
"end"; a word is a token whose id is its length. Everything a round computes from that has a closed form.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
from safetensors.torch import load_file, save_file

from actors.supervision.cures import Role
from actors.supervision.incidents import Incidents
from actors.supervision.slot import Supervision
from actors.supervision.trainers import SupervisedTrainers
from actors.supervision.turns import OwnDevices, Turns
from actors.trainer.group import Rank
from raylign.config import OfflineDpoConfig, OnlineDpoConfig
from raylign.config.blocks import RecoveryBlock
from raylign.config.losses import TrainerLoss
from raylign.config.reference import NoReferenceBlock, SamplerReferenceBlock
from raylign.config.scoring import ScoringBlock
from raylign.errors import GeneratorError, RaylignError, TrainerError
from raylign.losses import LossState, preference_loss
from raylign.records import Candidate, Completions, Preference, Prompt, ReferenceLogps, Score, TokenLogps
from raylign.reference.versions import reference_version
from raylign.roles import DeviceLink, Generator, Generators, NodePath, Publisher, Scorer, TrainerRank, Trainers
from raylign.run.checkpoints import Metrics
from raylign.sampling.decoding import Decoding, policy_versions, prompt_seed
from raylign.scoring.base import check_unscored
from raylign.scoring.usage import Usage, summary
from raylign.tracking.feed import MlflowFeed
from raylign.training.batches import BatchShape, Step, plan_steps
from raylign.training.kernels.head import TokenScores
from raylign.training.logprobs import CompletionScores
from raylign.training.preferences import completions_of, loss_input, preference_batch
from raylign.training.sequences import Layout, token_cost

P = ParamSpec("P")
T = TypeVar("T")
WEIGHT = "policy_version"
"""The one tensor of the policy, of shape [1]."""


def token_logp(version: int) -> float:
    return -1.0 / (version + 1)


class FakeEngine:
    """A `raylign.roles.Generator` that answers at once: `weights` computes, `label_now` is what it says it serves."""

    def __init__(self, events: list[str]) -> None:
        self.weights = self.label_now = 0
        self._events, self._paused = events, False

    async def sample(self, prompt: Prompt, decoding: Decoding, seed: int, version: int) -> list[Candidate]:
        if self._paused or version != self.label_now:
            raise GeneratorError(f"version {version} asked of an engine that serves {self.label_now}")
        self._events.append(f"sample {prompt.id}")
        own = decoding.num_generations - decoding.reference_generations
        weights = (self.weights,) * own + (0,) * decoding.reference_generations
        versions = policy_versions(decoding, version)
        return [self._candidate(prompt, index, of, versions[index], seed + index) for index, of in enumerate(weights)]

    def _candidate(self, prompt: Prompt, index: int, weights: int, version: int, seed: int) -> Candidate:
        text = f"{'good ' * (index + weights)}end"
        token_ids = tuple(len(word) for word in text.split())
        logprobs = (token_logp(weights),) * len(token_ids)
        return Candidate(prompt.id, index, token_ids, logprobs, text, "stop", version, seed)

    async def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        return [token_logp(self.weights)] * (len(token_ids) - 1)

    async def pause(self) -> None:
        self._events.append("pause")
        self._paused = True

    async def resume(self) -> None:
        self._events.append("resume")
        self._paused = False

    async def version(self) -> int:
        return self.label_now

    async def label(self, version: int) -> None:
        self.label_now = version

    async def take_weights(self, file: NodePath, version: int) -> None:
        self._events.append("load weights")
        self.weights = int(load_file(file.path)[WEIGHT])
        await self.label(version)

    async def take_adapter(self, folder: NodePath, version: int) -> None:
        self._events.append("load adapter")
        self.weights = int(load_file(Path(folder.path) / "adapter_model.safetensors")[WEIGHT])
        await self.label(version)

    async def ready(self) -> None: ...

    async def sleep(self, level: Literal[1, 2]) -> None: ...

    async def wake_up(self, tags: Sequence[str]) -> None: ...

    async def shutdown(self) -> None: ...

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None: ...

    async def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class FakeGenerators:
    """Engines in turn, called directly."""

    def __init__(self, engines: Sequence[FakeEngine], turns: Turns | None = None) -> None:
        self.engines = self.handles = tuple(engines)
        self._turns = turns or OwnDevices()
        self.served, self.pushed = 0, False

    def sample(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        seed: int,
        round_index: int,
        version: int,
        advance: Callable[[int], None],
        on_finished: Callable[[Sequence[Candidate]], None] = lambda candidates: None,
    ) -> list[Candidate]:
        self._turns.engines(Generator.sample)
        candidates = []
        for row, prompt in enumerate(prompts):
            engine = self.engines[row % len(self.engines)]
            found = asyncio.run(engine.sample(prompt, decoding, prompt_seed(seed, round_index, prompt.id), version))
            candidates += found
            on_finished(found)
            advance(1)
        return candidates

    def replace_dead(self) -> None: ...

    def call(
        self,
        what: str,
        timeout_s: float,
        method: Callable[Concatenate[Generator, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[T]:
        self._turns.engines(method)
        answers = [asyncio.run(getattr(engine, method.__name__)(*args, **kwargs)) for engine in self.engines]
        self._turns.engines_done(method)
        return answers

    def sleep(self, level: Literal[1, 2]) -> None:
        for engine in self.engines:
            asyncio.run(engine.sleep(level))

    def wake_up(self, tags: Sequence[str]) -> None:
        for engine in self.engines:
            asyncio.run(engine.wake_up(tags))


def count_good(prompt: Prompt, completion: str) -> float | None:
    return float(completion.count("good"))


class FakeScorer:
    """Scores with a function of prompt and completion; None is unscored."""

    def __init__(
        self,
        events: list[str],
        block: ScoringBlock,
        value: Callable[[Prompt, str], float | None] = count_good,
        gold: Callable[[Prompt, str], float | None] | None = None,
    ) -> None:
        self._events, self._limit, self._value, self._gold = events, block.max_unscored, value, gold
        self._usages: dict[str, Usage] = {}

    def metrics(self) -> Mapping[str, float]:
        return summary(self._usages)

    def score(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        advance: Callable[[int], None] = lambda items: None,
    ) -> list[Score]:
        self._events.append(f"score {len(candidates)}")
        self._usages = {"function": Usage([(len(candidates), 2.0)])}
        by_id = {prompt.id: prompt for prompt in prompts}
        values = [self._value(by_id[candidate.prompt_id], candidate.text) for candidate in candidates]
        scores = [Score(value, reason="late" if value is None else "") for value in values]
        check_unscored(scores, self._limit)
        advance(len(scores))
        return scores

    def gold(self, prompts: Sequence[Prompt], candidates: Sequence[Candidate]) -> list[Score]:
        if self._gold is None:
            return []
        by_id = {prompt.id: prompt for prompt in prompts}
        values = [self._gold(by_id[candidate.prompt_id], candidate.text) for candidate in candidates]
        return [Score(value, reason="late" if value is None else "") for value in values]


class FakeRank:
    """A `raylign.roles.TrainerRank` whose weights are a version number; a round of training adds 1.

    The reference is version 0.
    """

    def __init__(self, events: list[str], config: OnlineDpoConfig | OfflineDpoConfig) -> None:
        self.version = 0
        self._events, self._config = events, config
        self._loss: Any = config.loss
        self._pairs: Sequence[Preference] = ()
        self._plan: list[Step] = []
        self._reports: list[Metrics] = []

    def ready(self) -> int:
        return 0

    def layout(self) -> Layout:
        return "shared"

    def reference_logprobs(self, rows: Sequence[Completions]) -> TokenLogps:
        has_none = isinstance(self._config.reference, NoReferenceBlock | SamplerReferenceBlock)
        return [[[token_logp(0)] * len(tokens) for tokens in row.completions] for row in ([] if has_none else rows)]

    def initial_logprobs(self, rows: Sequence[Completions]) -> TokenLogps:
        known = rows if self._config.model.lora is not None else ()
        return [[[token_logp(0)] * len(tokens) for tokens in row.completions] for row in known]

    def policy_logps(self, rows: Sequence[Completions]) -> list[list[float]]:
        self._events.append(f"policy log-probs {len(rows)} of version {self.version}")
        return [[token_logp(self.version) * len(tokens) for tokens in row.completions] for row in rows]

    def reference_candidates(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int
    ) -> dict[int, ReferenceLogps]:
        self._events.append(f"reference {len(preferences)} seed {seed} after {rounds_done} rounds")
        by_token = self._config.loss.needs_reference_tokens
        return {
            index: ReferenceLogps(tuple(_logps(p, 0)), _kl_logp(p), _token_logps(p, 0) if by_token else ())
            for index, p in enumerate(preferences)
        }

    def old_logprobs(self, preferences: Sequence[Preference], seed: int) -> dict[int, tuple[tuple[float, ...], ...]]:
        self._events.append(f"old log-probs {len(preferences)} seed {seed}")
        return {index: _token_logps(p, self.version) for index, p in enumerate(preferences)}

    def evaluate(self, preferences: Sequence[Preference]) -> tuple[Metrics, dict[int, tuple[float, float, float]]]:
        self._events.append(f"evaluate {len(preferences)}")
        found = {}
        for index, preference in enumerate(preferences):
            chosen, rejected = (
                0.1 * (policy - reference)
                for policy, reference in zip(_logps(preference, self.version), preference.reference_logps, strict=True)
            )
            found[index] = (self._loss_of(preference), chosen, rejected)
        return {"loss": sum(loss for loss, _, _ in found.values()) / len(found)}, found

    def take_loss(self, loss: TrainerLoss) -> None:
        self._loss = loss

    def begin_round(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int, steps: Sequence[Metrics]
    ) -> int:
        self._events.append(f"train {len(preferences)} seed {seed}" + (f" from step {len(steps)}" if steps else ""))
        block = self._config.trainer
        costs = [token_cost(completions_of(preference), block.packing) for preference in preferences]
        shape = BatchShape(
            block.ranks, block.train_batch_size, block.per_device_train_batch_size, block.max_tokens_per_micro_batch
        )
        self._pairs, self._reports = preferences, list(steps)
        self._plan = plan_steps(costs, shape, epochs=block.num_train_epochs, seed=seed)
        return len(self._plan)

    def step_indices(self, number: int) -> tuple[int, ...]:
        return self._plan[number].indices()

    def train_step(self) -> Metrics:
        losses = [self._loss_of(self._pairs[index]) for index in self._plan[len(self._reports)].indices()]
        self._reports.append({"loss": sum(losses) / len(losses)})
        self.version += len(self._reports) == len(self._plan)
        return self._reports[-1]

    def _loss_of(self, preference: Preference) -> float:
        followed = reference_version(self._config.reference, self.version)
        batch = preference_batch([preference], [1.0], "packed", 0, reference_version=followed)
        logps = torch.full((len(batch.tokens.labels),), token_logp(self.version))
        owners = batch.tokens.owners
        summed = torch.zeros(batch.tokens.completions).index_add(0, owners, logps)
        zeros = torch.zeros_like(logps)
        scores = CompletionScores(summed, TokenScores(logps, zeros, zeros, zeros, zeros), owners)
        return preference_loss(loss_input(batch, scores), self._loss, LossState()).losses.item()

    def token_logps(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[token_logp(self.version)] * (len(ids) - 1) for ids in token_ids]

    def save_weights(self, path: str) -> None:
        self._events.append("save weights")
        save_file({WEIGHT: torch.tensor([self.version])}, path)

    def save_adapter(self, folder: str) -> None:
        self._events.append("save adapter")
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({WEIGHT: torch.tensor([self.version])}, Path(folder) / "adapter_model.safetensors")

    def state_bytes(self) -> int:
        return 0

    def save_state(self, folder: str, round_index: int) -> list[Metrics]:
        Path(folder).mkdir()
        save_file({WEIGHT: torch.tensor([self.version])}, Path(folder) / "state.safetensors")
        return self._reports

    def load_state(self, folder: str) -> None:
        self.version = int(load_file(Path(folder) / "state.safetensors")[WEIGHT])

    def offload(self, *, keep_weights: bool) -> None: ...

    def reload(self, *, weights_alone: bool) -> None: ...

    def free_address(self) -> tuple[str, int]:
        return "127.0.0.1", 0

    def send_weights(
        self, link: DeviceLink, handles: Sequence[Any], address: str, port: int, workers: int, timeout_s: float
    ) -> None:
        self._events.append(f"{link} to {len(handles)} of {workers}")
        for engine in handles:
            engine.weights = self.version


class CountingRank(FakeRank):
    """Every optimizer step is an event."""

    def train_step(self) -> Metrics:
        self._events.append("step")
        return super().train_step()


@dataclass(frozen=True, slots=True)
class FakeTeam:
    generators: Generators
    trainers: Trainers
    scorer: Scorer
    publisher: Publisher


_engine: type[Generator] = FakeEngine
_rank: type[TrainerRank] = FakeRank


def fake_trainers(
    rank: FakeRank, config: OnlineDpoConfig | OfflineDpoConfig, turns: Turns | None = None
) -> SupervisedTrainers:
    """The trainers that runs have, around one rank that is called directly."""

    def ask(
        ranks: Sequence[Rank],
        timeout_s: float,
        what: str,
        method: Callable[Concatenate[TrainerRank, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[T]:
        return [getattr(rank, method.__name__)(*args, **kwargs)]

    trainers = SupervisedTrainers(
        lambda: [_no_actor()],
        block=config.trainer,
        loss=config.loss,
        reference=config.reference,
        adapter=config.model.lora is not None,
        supervision=quiet_supervision("trainer", TrainerError),
        turns=turns,
        ask_ranks=ask,
    )
    trainers.replace_dead = lambda: None  # type: ignore[method-assign] # Ray knows of no such actor
    return trainers


class Killed(BaseException):
    """The process ends here; nothing of it runs any more."""


class Deadly(list[str]):
    """What the roles did; the `last` thing they do is their last."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self._last = last

    def append(self, event: str) -> None:
        if len(self) >= self._last:
            raise Killed
        super().append(event)


def _logps(preference: Preference, version: int) -> list[float]:
    return [token_logp(version) * len(candidate.token_ids) for candidate in preference.candidates]


def _token_logps(preference: Preference, version: int) -> tuple[tuple[float, ...], ...]:
    return tuple((token_logp(version),) * len(candidate.token_ids) for candidate in preference.candidates)


def _kl_logp(preference: Preference) -> float | None:
    sample = preference.kl_sample
    return None if sample is None else token_logp(0) * len(sample.token_ids)


def quiet_supervision(role: Role, error: type[RaylignError], stacks: Path = Path()) -> Supervision:
    """Counts and caps losses by the defaults and records none."""
    return Supervision(role, error, quiet_incidents(), stacks)


def quiet_incidents() -> Incidents:
    return Incidents(RecoveryBlock(), lambda *entry: None)


def _no_actor() -> Any:
    """Says that it has loaded."""
    return SimpleNamespace(ready=SimpleNamespace(remote=lambda: None))


class NoFeed(MlflowFeed):
    """An MLflow that is never there; the journal keeps every event."""

    def __init__(self) -> None:
        """Starts no thread."""

    def close(self, timeout_s: float) -> int:
        return 0
