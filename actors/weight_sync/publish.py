"""The publish sequence: pause, transfer, forget old prefixes, resume, canary."""

from collections.abc import Mapping
from dataclasses import dataclass

from actors.generator_pool import GeneratorPool
from actors.trainer_group import TrainerGroup
from actors.weight_sync.canary import Canary
from actors.weight_sync.transports import WeightTransport
from raylign.errors import GeneratorError, TrainerError, WeightSyncError


@dataclass(frozen=True, slots=True)
class Publisher:
    """Brings the generators to the trainer's weights and proves it."""

    trainers: TrainerGroup
    generators: GeneratorPool
    transport: WeightTransport
    canary: Canary
    timeout_s: float

    def publish(self, version: int) -> Mapping[str, float]:
        """Generators serve `version` when this returns; the value is the canary's gaps.

        Raises WeightSyncError; the generators must then be recreated, because a failed update leaves an engine
        half-loaded.
        """
        try:
            self._on_generators("pause", "pausing the generators")
            self.transport.push(self.trainers, self.generators, version, self.timeout_s)
            self._on_generators("resume", "resuming the generators")
            served = self._on_generators("version", "reading the served version")
        except (GeneratorError, TrainerError) as cause:
            raise WeightSyncError(f"publishing version {version} failed: {cause}") from cause
        if any(found != version for found in served):
            raise WeightSyncError(f"generators serve versions {served} after version {version} was pushed")
        return self.verify()

    def verify(self) -> Mapping[str, float]:
        """The canary alone."""
        return self.canary.check(self.trainers, self.generators, self.timeout_s)

    def _on_generators(self, method: str, what: str) -> list[int]:
        return self.generators.call(method, timeout_s=self.timeout_s, what=what)
