"""What the roles need of the cluster, checked before any actor starts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from raylign.config import EvaluateConfig, OnlineDpoConfig, RunConfig
from raylign.config.blocks import GeneratorsBlock, PlacementBlock, TrainerBlock
from raylign.errors import PlacementError

Device = Literal["cpu", "gpu"]


OUTSIDE = -1
"""The bundle of an actor that takes what no bundle has reserved."""


@dataclass(frozen=True, slots=True)
class ActorPlace:
    """Where one actor goes: its bundle and what it takes of it, or of the rest of the cluster (`OUTSIDE`)."""

    bundle: int
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """Bundles to reserve and the place of every actor. Made by `plan_placement`, read by `actors.team`."""

    device: Device
    bundles: tuple[Mapping[str, float], ...]
    generators: tuple[ActorPlace, ...]
    trainers: tuple[ActorPlace, ...]
    scorer: ActorPlace = ActorPlace(OUTSIDE, 0.0, 0.0)

    @property
    def ranks_beside(self) -> bool:
        """Whether every generator shares its bundle with a trainer rank."""
        return {place.bundle for place in self.generators} <= {place.bundle for place in self.trainers}

    @property
    def takes_turns(self) -> bool:
        """Whether a generator and a trainer rank have one GPU between them."""
        shared = {place.bundle for place in self.generators} & {place.bundle for place in self.trainers}
        return self.device == "gpu" and bool(shared)

    def required(self) -> dict[str, float]:
        """Totals over all bundles and a scorer outside of them."""
        totals = {name: sum(bundle.get(name, 0.0) for bundle in self.bundles) for name in ("CPU", "GPU")}
        if self.scorer.bundle != OUTSIDE:
            return totals
        return {"CPU": totals["CPU"] + self.scorer.num_cpus, "GPU": totals["GPU"] + self.scorer.num_gpus}


def choose_device(block: PlacementBlock, available: Mapping[str, float]) -> Device:
    """`auto` takes GPUs when the cluster has any."""
    if block.device != "auto":
        return block.device
    return "gpu" if available.get("GPU", 0.0) >= 1.0 else "cpu"


def plan_placement(
    block: PlacementBlock, generators: GeneratorsBlock, trainer: TrainerBlock, device: Device
) -> PlacementPlan:
    """Bundles for the roles. Colocated: generators and trainers share bundles, half of each; else each has its own.

    On CPUs as many ranks share a generator's bundle as its cores are enough for; the others have bundles of their own.
    A scorer with a share of a GPU joins the first bundle of a colocated run; else it is outside of all bundles.
    """
    scorer = ActorPlace(OUTSIDE, block.scorer_cpus, block.scorer_gpus)
    width = generators.tensor_parallel_size
    gpu = 1.0 if device == "gpu" else 0.0
    cpus, rank_cpus = float(block.generator_cpus), float(block.trainer_cpus)
    if block.mode == "disaggregated":
        bundles = [_bundle(cpus, gpu * width)] * generators.count + [_bundle(rank_cpus, gpu)] * trainer.ranks
        own = tuple(ActorPlace(index, cpus, gpu * width) for index in range(generators.count))
        places = tuple(ActorPlace(generators.count + rank, rank_cpus, gpu) for rank in range(trainer.ranks))
        return PlacementPlan(device, tuple(bundles), own, places, scorer)
    homes = _homes(
        trainer.ranks, generators.count, 1 if device == "gpu" else block.generator_cpus // block.trainer_cpus
    )
    bundles = [_bundle(max(cpus, rank_cpus), gpu)] * generators.count
    bundles += [_bundle(rank_cpus, gpu)] * (max(homes) + 1 - generators.count)
    own = tuple(ActorPlace(index, bundles[index]["CPU"] / 2, gpu / 2) for index in range(generators.count))
    places = tuple(ActorPlace(home, bundles[home]["CPU"] / 2 / homes.count(home), gpu / 2) for home in homes)
    plan = PlacementPlan(device, tuple(bundles), own, places, scorer)
    return _sharing(plan) if device == "gpu" and 0 < scorer.num_gpus < 1 else plan


def _sharing(plan: PlacementPlan) -> PlacementPlan:
    """The scorer in the first bundle, where the others share what it leaves of the GPU."""
    gpus = plan.scorer.num_gpus
    # Ray counts in ten-thousandths and would wait for ever for one more than there is.
    left = math.floor((1 - gpus) / 2 * 10_000) / 10_000

    def beside(places: tuple[ActorPlace, ...]) -> tuple[ActorPlace, ...]:
        return tuple(place if place.bundle else replace(place, num_gpus=left) for place in places)

    first, *others = plan.bundles
    bundles = ({**first, "CPU": first["CPU"] + plan.scorer.num_cpus}, *others)
    scorer = replace(plan.scorer, bundle=0)
    return PlacementPlan(plan.device, bundles, beside(plan.generators), beside(plan.trainers), scorer)


def plan_trainers(block: PlacementBlock, trainer: TrainerBlock, device: Device) -> PlacementPlan:
    """A bundle for each rank, and no other role."""
    cpus, gpus = float(block.trainer_cpus), 1.0 if device == "gpu" else 0.0
    places = tuple(ActorPlace(rank, cpus, gpus) for rank in range(trainer.ranks))
    return PlacementPlan(device, tuple(_bundle(cpus, gpus) for _ in places), (), places)


def _homes(ranks: int, generators: int, beside: int) -> list[int]:
    """The bundle of each rank: `beside` of them (at least one) with each generator, the others alone."""
    homes = [rank // max(1, beside) for rank in range(ranks)]
    together = sum(home < generators for home in homes)
    return [*homes[:together], *range(generators, generators + ranks - together)]


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def require_resources(plan: PlacementPlan, available: Mapping[str, float]) -> None:
    """Raises PlacementError with required and available totals when the cluster is too small."""
    short = {name: need for name, need in plan.required().items() if need > available.get(name, 0.0)}
    if short:
        needs = ", ".join(f"{need:g} {name} (available {available.get(name, 0.0):g})" for name, need in short.items())
        raise PlacementError(
            f"the cluster is too small: the roles need {needs}; lower placement.generator_cpus, "
            "placement.trainer_cpus, trainer.ranks or generators.count, or set placement.mode=colocated"
            + ("; placement.scorer_gpus too" if plan.scorer.num_gpus else "")
        )


def plan_team(config: OnlineDpoConfig, available: Mapping[str, float]) -> PlacementPlan:
    """Where every role goes. Raises PlacementError when `available`, the cluster's totals, is too little."""
    device = choose_device(config.placement, available)
    plan = plan_placement(config.placement, config.generators, config.trainer, device)
    require_resources(plan, available)
    return plan


def plan_trainer_team(config: RunConfig, available: Mapping[str, float]) -> PlacementPlan:
    """The same for trainers alone."""
    plan = plan_trainers(config.placement, config.trainer, choose_device(config.placement, available))
    require_resources(plan, available)
    return plan


def plan_evaluation(
    config: EvaluateConfig, available: Mapping[str, float], *, samples: bool
) -> tuple[PlacementPlan, PlacementPlan]:
    """Generators that answer (none unless it `samples`), and the scorer, which starts when they are gone.

    Raises PlacementError when `available`, the cluster's totals, is too little.
    """
    block, generators = config.placement, config.generators
    device = choose_device(block, available)
    cpus, gpus = float(block.generator_cpus), float(generators.tensor_parallel_size) if device == "gpu" else 0.0
    count = generators.count if samples else 0
    places = tuple(ActorPlace(index, cpus, gpus) for index in range(count))
    answering = PlacementPlan(device, tuple(_bundle(cpus, gpus) for _ in places), places, ())
    scorer = ActorPlace(0, max(1.0, block.scorer_cpus), block.scorer_gpus)
    scoring = PlacementPlan(device, (_bundle(scorer.num_cpus, scorer.num_gpus),), (), (), scorer)
    for plan in (answering, scoring):
        require_resources(plan, available)
    return answering, scoring
