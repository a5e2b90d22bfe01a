"""Roles without Ray, vLLM and DeepSpeed, around a policy that is nothing but its version number.

Version v gives every token the log-probability -1 / (v + 1) nats and answers with `index + v` times "good", then
"end"; a word is a token whose id is its length. Everything a round computes from that has a closed form.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from actors.scorer.client import ScorerClient
from actors.supervision.generators import SupervisedGenerators
from actors.supervision.incidents import Incidents
from actors.supervision.trainers import SupervisedTrainers
from raylign.config import OfflineDpoConfig, OnlineDpoConfig
from raylign.config.blocks import GeneratorsBlock, RecoveryBlock
from raylign.config.reference import NoReferenceBlock, SamplerReferenceBlock
from raylign.config.scoring import ScoringBlock
from raylign.errors import GeneratorError
from raylign.losses import CandidateLogps, LossState, preference_loss
from raylign.records import Candidate, Preference, Prompt, Score
from raylign.reference.versions import reference_version
from raylign.run.checkpoints import Metrics
from raylign.sampling.decoding import Decoding, policy_versions, prompt_seed
from raylign.scoring import Usage, check_unscored
from raylign.tracking.feed import MlflowFeed
from raylign.training.batches import BatchShape, Step, plan_steps
from raylign.training.preferences import completions_of
from raylign.training.sequences import Completions, token_cost

WEIGHT = "policy_version"
"""The one tensor of the policy, of shape [1]."""


def token_logp(version: int) -> float:
    return -1.0 / (version + 1)


class FakeEngine:
    """What one generator actor does, at once. `weights` is what it computes with, `label` what it says it serves."""

    def __init__(self, events: list[str]) -> None:
        self.weights = self.label_now = 0
        self._events, self._paused = events, False

    def sample(self, prompt: Prompt, decoding: Decoding, seed: int, version: int) -> list[Candidate]:
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

    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        return [token_logp(self.weights)] * (len(token_ids) - 1)

    def pause(self) -> None:
        self._events.append("pause")
        self._paused = True

    def resume(self) -> None:
        self._events.append("resume")
        self._paused = False

    def version(self) -> int:
        return self.label_now

    def label(self, version: int) -> None:
        self.label_now = version

    def take_weights(self, path: str, version: int) -> None:
        self._events.append("load weights")
        self.weights = int(load_file(path)[WEIGHT])
        self.label(version)

    def take_adapter(self, path: str, version: int) -> None:
        self._events.append("load adapter")
        self.weights = int(load_file(Path(path) / "adapter_model.safetensors")[WEIGHT])
        self.label(version)


class FakeGenerators(SupervisedGenerators):
    """Engines in turn, called directly."""

    def __init__(self, engines: Sequence[FakeEngine]) -> None:
        handles: list[Any] = list(engines)
        super().__init__(
            handles.__getitem__,
            lambda handle: None,
            block=GeneratorsBlock(count=len(engines)),
            recovery=RecoveryBlock(),
            incidents=quiet_incidents(),
            stacks=Path(),
        )
        self.engines = tuple(engines)

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
        candidates = []
        for row, prompt in enumerate(prompts):
            engine = self.engines[row % len(self.engines)]
            found = engine.sample(prompt, decoding, prompt_seed(seed, round_index, prompt.id), version)
            candidates += found
            on_finished(found)
            advance(1)
        return candidates

    def call(self, method: str, *args: object, timeout_s: float, what: str) -> list[Any]:
        return [getattr(engine, method)(*args) for engine in self.engines]


def count_good(prompt: Prompt, completion: str) -> float | None:
    return float(completion.count("good"))


class FakeScorer(ScorerClient):
    """Scores with a function of prompt and completion; None is unscored."""

    def __init__(
        self,
        events: list[str],
        block: ScoringBlock,
        value: Callable[[Prompt, str], float | None] = count_good,
    ) -> None:
        super().__init__(_no_actor, block, quiet_incidents(), stacks=Path(), start_timeout_s=1.0)
        self._events, self._limit, self._value = events, block.max_unscored, value

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


class FakeTrainers(SupervisedTrainers):
    """One rank whose weights are a version number; a round of training adds 1. The reference is version 0."""

    def __init__(self, events: list[str], config: OnlineDpoConfig | OfflineDpoConfig) -> None:
        super().__init__(
            lambda: [_no_actor()],
            block=config.trainer,
            loss=config.loss,
            reference=config.reference,
            adapter=config.model.lora is not None,
            incidents=quiet_incidents(),
            stacks=Path(),
        )
        self.version = 0
        self._events, self._config = events, config
        self._pairs: Sequence[Preference] = ()
        self._plan: list[Step] = []
        self._reports: list[Metrics] = []

    def with_reference(self, preferences: Sequence[Preference], seed: int, rounds_done: int) -> tuple[Preference, ...]:
        self._events.append(f"reference {len(preferences)} seed {seed} after {rounds_done} rounds")
        return super().with_reference(preferences, seed, rounds_done)

    def _ask(self, method: str, *args: Any, what: str, steps: int) -> list[Any]:
        """What the one rank answers."""
        match method:
            case "reference_logps":
                has_none = isinstance(self._reference, NoReferenceBlock | SamplerReferenceBlock)
                rows: Sequence[Completions] = () if has_none else args[0]
                return [[[token_logp(0) * len(tokens) for tokens in row.completions] for row in rows]]
            case "initial_logps":
                rows = args[0] if self._config.model.lora is not None else ()
                return [[[token_logp(0) * len(tokens) for tokens in row.completions] for row in rows]]
            case "reference_candidates":
                return [{index: (*_logps(p, version=0), *_kl_logps(p)) for index, p in enumerate(args[0])}]
            case "evaluate":
                return [self._evaluate(args[0])]
            case "state_bytes":
                return [0]
            case "save_state":
                Path(args[0]).mkdir()
                save_file({WEIGHT: torch.tensor([self.version])}, Path(args[0]) / "state.safetensors")
                return [self._reports]
            case "load_state":
                self.version = int(load_file(Path(args[0]) / "state.safetensors")[WEIGHT])
                return [None]
            case "save_adapter" | "save_weights":
                getattr(self, method)(*args)
                return [None]
            case "begin_round":
                return [self._begin(*args)]
            case "train_step":
                return [self._train_step()]
            case "step_indices":
                return [self._plan[args[0]].indices()]
        raise AssertionError(f"{method} has no fake")

    def put(self, preferences: Sequence[Preference]) -> Any:
        return preferences

    def _evaluate(self, preferences: Sequence[Preference]) -> tuple[Metrics, dict[int, tuple[float, float, float]]]:
        self._events.append(f"evaluate {len(preferences)}")
        found = {}
        for index, preference in enumerate(preferences):
            chosen, rejected = (
                0.1 * (policy - reference)
                for policy, reference in zip(_logps(preference, self.version), preference.reference_logps, strict=True)
            )
            found[index] = (self._loss_of(preference), chosen, rejected)
        return {"loss": sum(loss for loss, _, _ in found.values()) / len(found)}, found

    def _begin(self, preferences: Sequence[Preference], seed: int, rounds_done: int, steps: Sequence[Metrics]) -> int:
        self._events.append(f"train {len(preferences)} seed {seed}" + (f" from step {len(steps)}" if steps else ""))
        block = self._config.trainer
        costs = [token_cost(completions_of(preference), block.packing) for preference in preferences]
        shape = BatchShape(
            block.ranks, block.train_batch_size, block.per_device_train_batch_size, block.max_tokens_per_micro_batch
        )
        self._pairs, self._reports = preferences, list(steps)
        self._plan = plan_steps(costs, shape, epochs=block.num_train_epochs, seed=seed)
        return len(self._plan)

    def _train_step(self) -> Metrics:
        losses = [self._loss_of(self._pairs[index]) for index in self._plan[len(self._reports)].indices()]
        self._reports.append({"loss": sum(losses) / len(losses)})
        self.version += len(self._reports) == len(self._plan)
        return self._reports[-1]

    def _loss_of(self, preference: Preference) -> float:
        policy = torch.tensor([_logps(preference, self.version)])
        version = reference_version(self._reference, self.version)
        logps = CandidateLogps(
            policy=policy,
            reference=torch.tensor([preference.reference_logps]),
            lengths=torch.tensor([[len(candidate.token_ids) for candidate in preference.candidates]]),
            scores=torch.tensor([preference.scores]),
            mask=torch.ones_like(policy, dtype=torch.bool),
            entropies=torch.zeros_like(policy),
            certainty=torch.zeros_like(policy),
            from_reference=torch.tensor([[candidate.policy_version == version for candidate in preference.candidates]]),
            kl_logratios=torch.zeros(1),
        )
        return preference_loss(logps, self._config.loss, LossState()).losses.item()

    def token_logps(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[token_logp(self.version)] * (len(ids) - 1) for ids in token_ids]

    def save_weights(self, path: str) -> None:
        self._events.append("save weights")
        save_file({WEIGHT: torch.tensor([self.version])}, path)

    def save_adapter(self, folder: str) -> None:
        self._events.append("save adapter")
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({WEIGHT: torch.tensor([self.version])}, Path(folder) / "adapter_model.safetensors")

    def send_nccl(self, handles: Sequence[Any], workers: int, timeout_s: float) -> None:
        self._events.append(f"broadcast to {workers}")
        for engine in handles:
            engine.weights = self.version


class CountingTrainers(FakeTrainers):
    """Every optimizer step is an event."""

    def _train_step(self) -> Metrics:
        self._events.append("step")
        return super()._train_step()


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


def _kl_logps(preference: Preference) -> list[float]:
    sample = preference.kl_sample
    return [] if sample is None else [token_logp(0) * len(sample.token_ids)]


def quiet_incidents() -> Incidents:
    """Counts and caps losses by the defaults and records none."""
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
