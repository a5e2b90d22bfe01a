"""N trainer ranks behind one port; every call runs on all of them, because their collectives need all of them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.supervision.waiting import get_all, get_together
from raylign.config.losses import TrainerLoss
from raylign.config.reference import NoReferenceBlock, ReferenceBlock, SamplerReferenceBlock
from raylign.errors import TrainerError
from raylign.evaluation.held_out import HeldOut
from raylign.records import Preference
from raylign.run.checkpoints import Metrics
from raylign.training.preferences import sampler_logps
from raylign.training.sequences import Completions


class TrainerGroup:
    """The DeepSpeed group as the driver sees it. Handle 0 is rank 0."""

    def __init__(
        self,
        handles: Sequence[ActorHandle[Any]],
        *,
        loss: TrainerLoss,
        reference: ReferenceBlock,
        step_timeout_s: float,
    ) -> None:
        self.handles = tuple(handles)
        self._loss, self._reference, self._step_timeout_s = loss, reference, step_timeout_s

    def reference_logps(self, rows: Sequence[Completions]) -> list[list[float]]:
        """Summed log-probs (nats) of the completions of each row under the reference, in order; [] without one."""
        return self._in_order("reference_logps", rows, "reference log-probs")

    def initial_logps(self, rows: Sequence[Completions]) -> list[list[float]]:
        """The same under the policy before round 1; [] where the trainers hold no adapter, whose base it is."""
        return self._in_order("initial_logps", rows, "log-probs of the initial policy")

    def _in_order(self, method: str, rows: Sequence[Completions], what: str) -> list[list[float]]:
        shares = self._call(method, rows, what=what, steps=len(rows))
        world = len(self.handles)
        return [shares[index % world][index // world] for index in range(len(rows))] if shares[0] else []

    def with_reference(self, preferences: Sequence[Preference], seed: int, rounds_done: int) -> tuple[Preference, ...]:
        """The preferences with the reference's log-probs filled in, once for all epochs; `seed` is that of `train`.

        A reference that follows the policy takes its part of it first, of which `rounds_done` rounds are trained.
        """
        logps = self._reference_of(preferences, seed, rounds_done)
        return tuple(_filled(p, logps[index]) for index, p in enumerate(preferences))

    def _reference_of(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int
    ) -> Mapping[int, tuple[float, ...]]:
        """By index: of the candidates, then of the KL sample where there is one."""
        match self._reference:
            case NoReferenceBlock():
                return {index: (0.0,) * len(p.candidates) for index, p in enumerate(preferences)}
            case SamplerReferenceBlock():
                tail = self._loss.tail_weight
                return {i: (*sampler_logps(p, tail), *_sampled_kl(p)) for i, p in enumerate(preferences)}
        arguments = (preferences, seed, rounds_done)
        shares = self._call("reference_candidates", *arguments, what="reference log-probs", steps=len(preferences))
        return {index: values for share in shares for index, values in share.items()}

    def evaluate(self, preferences: Sequence[Preference]) -> HeldOut:
        """Loss and rewards of held-out preferences, without a step: nothing that training goes on from is changed.

        `reference_logps` must be filled in (`with_reference`, once for all evaluations) where the loss reads them, and
        may be empty elsewhere. Raises TrainerError when they are missing, or there are no preferences.
        """
        if not preferences:
            raise TrainerError("there are no held-out preferences to evaluate on; give at least one")
        shared = self.put(preferences)
        shares = self._call("evaluate", shared, what="held-out evaluation", steps=len(preferences))
        found = {index: values for _, share in shares for index, values in share.items()}
        losses, chosen, rejected = zip(*(found[index] for index in range(len(preferences))), strict=True)
        return HeldOut(shares[0][0], losses, chosen, rejected)

    def train(self, preferences: Sequence[Preference], seed: int, rounds_done: int = 0) -> Iterator[Metrics]:
        """One round's optimizer steps, each yielded with TRL's metrics as it finishes on every rank."""
        for _ in range(self.begin_round(preferences, seed, rounds_done, ())):
            yield self.train_step()

    def begin_round(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int, steps: Sequence[Metrics]
    ) -> int:
        """Get ready for the round after `rounds_done`, of which `steps` are done; returns how many there are in all."""
        shared = self.put(preferences)
        count: int = self._call("begin_round", shared, seed, rounds_done, steps, what="planning a round", steps=1)[0]
        return count

    def put(self, preferences: Sequence[Preference]) -> Any:
        """Preferences where every rank can take them from."""
        return ray.put(tuple(preferences))

    def train_step(self) -> Metrics:
        """The next optimizer step of the round."""
        metrics: Metrics = self._call("train_step", what="an optimizer step", steps=1)[0]
        return metrics

    def step_indices(self, number: int) -> tuple[int, ...]:
        """Which preferences of the round step `number` (from 0) trains on."""
        indices: tuple[int, ...] = self._call("step_indices", number, what="the plan of a step", steps=1)[0]
        return indices

    def state_bytes(self) -> int:
        """Disk space that a checkpoint takes, at most."""
        size: int = self._call("state_bytes", what="the size of a checkpoint", steps=1)[0]
        return size

    def save_state(self, folder: str, round_index: int) -> list[Metrics]:
        """Write what training goes on from; returns the metrics of that round's steps so far."""
        steps: list[Metrics] = self._call("save_state", folder, round_index, what="saving the training state", steps=1)[
            0
        ]
        return steps

    def load_state(self, folder: str) -> None:
        """Go on from what `save_state` wrote."""
        self._call("load_state", folder, what="loading the training state", steps=1)

    def token_logps(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of ids[1:] under the policy for each list of ids, from rank 0."""
        logps: list[list[float]] = self._call("token_logps", token_ids, what="canary log-probs", steps=1)[0]
        return logps

    def save_weights(self, path: str) -> None:
        """Write the merged weights to a safetensors file on rank 0's node."""
        self._call("save_weights", path, what="gathering weights", steps=1)

    def save_adapter(self, folder: str) -> None:
        """Write a PEFT adapter into a folder on rank 0's node."""
        self._call("save_adapter", folder, what="gathering the adapter", steps=1)

    def send_nccl(self, handles: Sequence[ActorHandle[Any]], workers: int, timeout_s: float) -> None:
        """Broadcast the merged weights to the engines behind `handles`, `workers` processes in all."""
        address, port = get_all([self.handles[0].free_address.remote()], timeout_s, "a free port", TrainerError)[0]
        self._call("send_nccl", handles, address, port, workers, timeout_s, what="sending weights", steps=1)

    def _call(self, method: str, *args: object, what: str, steps: int) -> list[Any]:
        """Every rank's answer."""
        return self._ask(method, *args, what=what, steps=steps)

    def _ask(self, method: str, *args: object, what: str, steps: int) -> list[Any]:
        """Every rank's answer, or ActorsLost. The deadline is that of `steps` optimizer steps."""
        refs = [getattr(handle, method).remote(*args) for handle in self.handles]
        return get_together(refs, self._step_timeout_s * max(1, steps), what, TrainerError)


def _filled(preference: Preference, logps: Sequence[float]) -> Preference:
    count = len(preference.candidates)
    filled = dataclasses.replace(preference, reference_logps=tuple(logps[:count]))
    if preference.kl_sample is None or len(logps) == count:
        return filled
    return dataclasses.replace(filled, kl_sample=dataclasses.replace(preference.kl_sample, reference_logp=logps[count]))


def _sampled_kl(preference: Preference) -> tuple[float, ...]:
    sample = preference.kl_sample
    return () if sample is None else (sample.sampler_logp,)
