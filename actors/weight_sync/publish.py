"""New weights into every generator, and the proof that what vLLM serves is what the trainer holds."""

import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from ray.actor import ActorHandle

from actors.calls import ask_all
from actors.supervision.turns import OwnDevices, Turns
from actors.supervision.watch import get_together
from actors.weight_sync.transports import WeightTransport
from raylign.errors import ActorsLost, GeneratorError, TrainerError, WeightSyncError
from raylign.roles import Engines, Generator, Generators, Trainers

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Canary:
    """Fixed token ids, each list a prompt of two tokens or more, and the largest mean gap (nats) that passes."""

    token_ids: tuple[tuple[int, ...], ...]
    max_gap: float

    def check(self, trainers: Trainers, generators: Engines, timeout_s: float) -> Mapping[str, float]:
        """`logprob_gap_mean` and `logprob_gap_max` (absolute, nats) over all tokens and generators.

        Raises WeightSyncError when the mean exceeds the limit.
        """
        expected = trainers.token_logps(self.token_ids)
        gaps = []
        for ids, logps in zip(self.token_ids, expected, strict=True):
            for served in generators.call("canary", timeout_s, Generator.token_logps, ids):
                gaps.append(_gaps(logps, served))
        means = [sum(gap) / len(gap) for gap in gaps]
        worst = max(means, key=lambda mean: math.inf if math.isnan(mean) else mean)
        if not worst <= self.max_gap:
            raise WeightSyncError(
                f"canary: vLLM's log-probs differ from the trainer's by {worst:.4f} nats a token, limit "
                f"{self.max_gap:g}; the generators do not serve the trainer's weights. If the model is very deep or "
                "quantised, measure the gap of version 0 and raise generators.weight_sync.canary_max_gap"
            )
        flat = [gap for group in gaps for gap in group]
        return {"logprob_gap_mean": sum(flat) / len(flat), "logprob_gap_max": max(flat)}


def _gaps(expected: Sequence[float], served: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(expected, served, strict=True)]


@dataclass(frozen=True, slots=True)
class OneEngine:
    """A generator that has just started, while the others work on."""

    handles: Sequence[ActorHandle[Generator]]
    turns: Turns

    def call(
        self,
        what: str,
        timeout_s: float,
        method: Callable[Concatenate[Generator, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[T]:
        self.turns.engines(method)
        answers = get_together(ask_all(self.handles, method, *args, **kwargs), timeout_s, what, GeneratorError)
        self.turns.engines_done(method)
        return answers


@dataclass(frozen=True, slots=True)
class WeightPublisher:
    """Brings the generators to the trainer's weights and proves it. `raylign.roles.Publisher` tells of its methods."""

    trainers: Trainers
    generators: Generators
    transport: WeightTransport
    canary: Canary
    timeout_s: float
    turns: Turns = OwnDevices()

    def publish(self, version: int) -> Mapping[str, float]:
        self.generators.served = version
        self.generators.pushed = True
        began = time.monotonic()
        nbytes = self._push_until_whole(version)
        seconds = time.monotonic() - began
        return {"bytes": nbytes, "seconds": seconds, "gb_per_s": nbytes / 1e9 / seconds} | dict(self.verify())

    def _push_until_whole(self, version: int) -> int:
        """Once more where someone was lost and replaced meanwhile; the cap of restarts is the cap of this, too."""
        while True:
            before = self._members()
            try:
                return self._push(self.generators, version)
            except (GeneratorError, TrainerError, WeightSyncError, ActorsLost) as cause:
                self.trainers.replace_dead()
                self.generators.replace_dead()
                if self._members() == before:
                    raise WeightSyncError(f"publishing version {version} failed: {cause}") from cause
                log.warning("publishing version %d once more: %s", version, cause)

    def _members(self) -> Sequence[Any]:
        return [*self.trainers.handles, *self.generators.handles]

    def _push(self, engines: Engines, version: int) -> int:
        nbytes = self.transport.push(self.trainers, engines, version, self.timeout_s)
        served = engines.call("reading the served version", self.timeout_s, Generator.version)
        if any(found != version for found in served):
            raise WeightSyncError(f"generators serve versions {served} after version {version} was pushed")
        return nbytes

    def catch_up(self, handle: ActorHandle[Generator]) -> None:
        """Bring one generator that has just started to the version that the others serve, and prove it.

        Raises ActorsLost when it dies, WeightSyncError when it does not serve the trainer's weights.
        """
        alone = OneEngine([handle], self.turns)
        if self.generators.pushed:
            self._push(alone, self.generators.served)
        self.canary.check(self.trainers, alone, self.timeout_s)

    def verify(self) -> Mapping[str, float]:
        return self.canary.check(self.trainers, self.generators, self.timeout_s)
