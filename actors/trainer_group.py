"""N trainer ranks behind one port; every call runs on all of them, because their collectives need all of them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.waiting import get_all
from raylign.config.losses import LossBlock
from raylign.config.reference import NoReferenceBlock, ReferenceBlock, SamplerReferenceBlock
from raylign.errors import TrainerError
from raylign.records import Preference
from raylign.training.preferences import sampler_logps
from raylign.training.sequences import Completions


class TrainerGroup:
    """The DeepSpeed group as the driver sees it. Handle 0 is rank 0."""

    def __init__(
        self, handles: Sequence[ActorHandle[Any]], *, loss: LossBlock, reference: ReferenceBlock, step_timeout_s: float
    ) -> None:
        self.handles = tuple(handles)
        self._loss, self._reference, self._step_timeout_s = loss, reference, step_timeout_s

    def reference_logps(self, rows: Sequence[Completions]) -> list[list[float]]:
        """Summed log-probs (nats) of the completions of each row under the reference, in order; [] without one."""
        shares = self._call("reference_logps", rows, what="reference log-probs", steps=len(rows))
        world = len(self.handles)
        return [shares[index % world][index // world] for index in range(len(rows))] if shares[0] else []

    def with_reference(self, preferences: Sequence[Preference], seed: int, rounds_done: int) -> tuple[Preference, ...]:
        """The preferences with `reference_logps` filled in, once for all epochs; `seed` is that of `train`.

        A reference that follows the policy takes its part of it first, of which `rounds_done` rounds are trained.
        """
        logps = self._reference_of(preferences, seed, rounds_done)
        return tuple(dataclasses.replace(p, reference_logps=logps[index]) for index, p in enumerate(preferences))

    def _reference_of(
        self, preferences: Sequence[Preference], seed: int, rounds_done: int
    ) -> Mapping[int, tuple[float, ...]]:
        match self._reference:
            case NoReferenceBlock():
                return {index: (0.0,) * len(p.candidates) for index, p in enumerate(preferences)}
            case SamplerReferenceBlock():
                return {index: sampler_logps(p, self._loss.tail_weight) for index, p in enumerate(preferences)}
        arguments = (preferences, seed, rounds_done)
        shares = self._call("reference_candidates", *arguments, what="reference log-probs", steps=len(preferences))
        return {index: values for share in shares for index, values in share.items()}

    def train(self, preferences: Sequence[Preference], seed: int) -> Iterator[dict[str, float]]:
        """One round's optimizer steps, each yielded with TRL's metrics as it finishes on every rank."""
        shared = ray.put(tuple(preferences))
        streams = [handle.train.options(num_returns="streaming").remote(shared, seed) for handle in self.handles]
        while (metrics := self._next(streams)) is not None:
            yield metrics[0]

    def _next(self, streams: Sequence[Any]) -> list[dict[str, float]] | None:
        """The next item of every stream; None when they have ended."""
        ready, waiting = ray.wait(list(streams), num_returns=len(streams), timeout=self._step_timeout_s)
        if waiting:
            raise TrainerError(
                f"{len(waiting)} of {len(streams)} ranks did not finish an optimizer step within "
                f"{self._step_timeout_s:g} s; raise trainer.step_timeout_s or look at the trainer's log"
            )
        try:
            refs = [next(stream) for stream in streams]
        except StopIteration:
            return None
        return get_all(refs, self._step_timeout_s, "training", TrainerError)

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
        refs = [getattr(handle, method).remote(*args) for handle in self.handles]
        return get_all(refs, self._step_timeout_s * max(1, steps), what, TrainerError)
