"""The publish sequence: pause, transfer, forget old prefixes, resume, canary."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray.actor import ActorHandle

from actors.generator_pool import GeneratorPool
from actors.trainer_group import TrainerGroup
from actors.weight_sync.canary import Canary
from actors.weight_sync.transports import NcclTransport, WeightTransport
from raylign.errors import ActorsLost, GeneratorError, TrainerError, WeightSyncError


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

        When a generator dies meanwhile all are replaced: what an update that broke off left in the others is not to be
        used. Raises WeightSyncError; the generators must then be recreated.
        """
        self.generators.served = version
        try:
            try:
                self._push(version)
            except ActorsLost as lost:
                self.generators.replace_all(f"publishing version {version}: {lost}")
        except (GeneratorError, TrainerError) as cause:
            raise WeightSyncError(f"publishing version {version} failed: {cause}") from cause
        return self.verify()

    def _push(self, version: int) -> None:
        self.generators.pushed = True
        self._on_generators("pause", "pausing the generators")
        self.transport.push(self.trainers, self.generators, version, self.timeout_s)
        self._on_generators("resume", "resuming the generators")
        served = self._on_generators("version", "reading the served version")
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
        alone = replace(self, generators=GeneratorPool([handle], max_num_seqs=1, timeout_s=self.timeout_s))
        if self.generators.pushed:
            alone._push(self.generators.served)
        alone.verify()

    def verify(self) -> Mapping[str, float]:
        """The canary alone."""
        return self.canary.check(self.trainers, self.generators, self.timeout_s)

    def _on_generators(self, method: str, what: str) -> list[int]:
        return self.generators.call(method, timeout_s=self.timeout_s, what=what)
