"""The publish sequence: transfer between requests, read the version back, canary."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from ray.actor import ActorHandle

from actors.calls import ask_all
from actors.supervision.waiting import get_together
from actors.weight_sync.canary import Canary
from actors.weight_sync.transports import WeightTransport
from raylign.errors import GeneratorError, TrainerError, WeightSyncError
from raylign.roles import Engines, Generator, Generators, Trainers

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _OneEngine:
    """A generator that has just started, while the others work on."""

    handles: Sequence[ActorHandle[Generator]]

    def call(
        self,
        what: str,
        timeout_s: float,
        method: Callable[Concatenate[Generator, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[T]:
        return get_together(ask_all(self.handles, method, *args, **kwargs), timeout_s, what, GeneratorError)


@dataclass(frozen=True, slots=True)
class WeightPublisher:
    """Brings the generators to the trainer's weights and proves it. `raylign.roles.Publisher` tells of its methods."""

    trainers: Trainers
    generators: Generators
    transport: WeightTransport
    canary: Canary
    timeout_s: float

    def publish(self, version: int) -> Mapping[str, float]:
        self.generators.served = version
        self.generators.pushed = True
        try:
            self._push(self.generators, version)
        except (GeneratorError, TrainerError) as cause:
            raise WeightSyncError(f"publishing version {version} failed: {cause}") from cause
        return self.verify()

    def _push(self, engines: Engines, version: int) -> None:
        self.transport.push(self.trainers, engines, version, self.timeout_s)
        served = engines.call("reading the served version", self.timeout_s, Generator.version)
        if any(found != version for found in served):
            raise WeightSyncError(f"generators serve versions {served} after version {version} was pushed")

    def catch_up(self, handle: ActorHandle[Generator]) -> None:
        """Bring one generator that has just started to the version that the others serve, and prove it.

        Raises ActorsLost when it dies, WeightSyncError when it does not serve the trainer's weights.
        """
        if not self.transport.takes_newcomers:
            raise WeightSyncError(
                f"generators.weight_sync.transport={self.transport.engine.name} cannot reach a generator that starts "
                "later than the others; run the same command again: it goes on at "
                "the first stage that is not finished"
            )
        alone = _OneEngine([handle])
        if self.generators.pushed:
            self._push(alone, self.generators.served)
        self.canary.check(self.trainers, alone, self.timeout_s)

    def verify(self) -> Mapping[str, float]:
        return self.canary.check(self.trainers, self.generators, self.timeout_s)
