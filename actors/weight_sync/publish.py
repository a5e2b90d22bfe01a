"""The publish sequence: transfer between requests, read the version back, canary."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray.actor import ActorHandle

from actors.generator.pool import GeneratorPool
from actors.trainer.group import TrainerGroup
from actors.weight_sync.canary import Canary
from actors.weight_sync.transports import NcclTransport, WeightTransport
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

        Raises WeightSyncError; the generators must then be recreated.
        """
        self.generators.served = version
        try:
            self._push(version)
        except (GeneratorError, TrainerError) as cause:
            raise WeightSyncError(f"publishing version {version} failed: {cause}") from cause
        return self.verify()

    def _push(self, version: int) -> None:
        self.generators.pushed = True
        self.transport.push(self.trainers, self.generators, version, self.timeout_s)
        served = self.generators.call("version", timeout_s=self.timeout_s, what="reading the served version")
        if any(found != version for found in served):
            raise WeightSyncError(f"generators serve versions {served} after version {version} was pushed")

    def catch_up(self, handle: ActorHandle[Any]) -> None:
        """Bring one generator that has just started to the version that the others serve, and prove it.

        Raises ActorsLost when it dies, WeightSyncError when it does not serve the trainer's weights.
        """
        if isinstance(self.transport, NcclTransport):
            raise WeightSyncError(
                "a new generator cannot join the NCCL group of the others; run the same command again: it goes on at "
                "the first stage that is not finished"
            )
        alone = replace(self, generators=GeneratorPool([handle]))
        if self.generators.pushed:
            alone._push(self.generators.served)
        alone.verify()

    def verify(self) -> Mapping[str, float]:
        """The canary alone."""
        return self.canary.check(self.trainers, self.generators, self.timeout_s)
