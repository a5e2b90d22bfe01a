"""Trainers alone: the team of recipes that train on a data set."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from ray.util.placement_group import PlacementGroup, remove_placement_group

from actors.placement import PlacementPlan, choose_device, plan_trainers, require_resources, reserve
from actors.supervision.incidents import Incidents
from actors.supervision.processes import kill
from actors.supervision.stacks import FOLDER as STACKS
from actors.supervision.stacks import remove_empty
from actors.supervision.trainers import SupervisedTrainers, start_ranks
from actors.supervision.watch import watched
from actors.team import placed
from actors.trainer.actor import TrainerSpec
from raylign.config import OfflineConfig, RunConfig
from raylign.config.losses import TrainerLoss
from raylign.config.reference import ReferenceBlock
from raylign.reference.checkpoint import resolve_reference


def plan_trainer_team(config: RunConfig, available: Mapping[str, float]) -> PlacementPlan:
    """Where every rank goes. Raises PlacementError when `available`, the cluster's totals, is too little."""
    plan = plan_trainers(config.placement, config.trainer, choose_device(config.placement, available))
    require_resources(plan, available)
    return plan


@contextmanager
def trainer_team(
    config: OfflineConfig,
    loss: TrainerLoss,
    reference: ReferenceBlock,
    *,
    folder: str,
    pad_id: int,
    plan: PlacementPlan,
    incidents: Incidents,
) -> Iterator[SupervisedTrainers]:
    """Start the ranks, yield them, and kill every process of theirs at the end, whatever happened."""
    with ExitStack() as stack:
        group = reserve(plan, config.placement.ready_timeout_s)
        stack.callback(remove_placement_group, group)
        incidents.memory.note()
        stacks = (config.run.dir / config.run.name).absolute() / STACKS
        stack.callback(remove_empty, stacks)
        spec = TrainerSpec(
            folder=folder,
            reference_folder=resolve_reference(reference, config.model, folder),
            pad_id=pad_id,
            model=config.model,
            trainer=config.trainer,
            loss=loss,
            reference=reference,
            rounds=config.rounds,
            seed=config.run.seed,
            threads=config.placement.trainer_cpus,
            on_gpu=plan.device == "gpu",
            stacks=str(stacks),
        )
        trainers = SupervisedTrainers(
            lambda: start_ranks(spec, _places(plan, group)),
            block=config.trainer,
            loss=loss,
            reference=reference,
            adapter=config.model.lora is not None,
            incidents=incidents,
            stacks=stacks,
        )
        stack.callback(lambda: kill(trainers.handles))
        with watched((trainers,), config.recovery.heartbeat_s):
            yield trainers


def _places(plan: PlacementPlan, group: PlacementGroup) -> list[dict[str, object]]:
    return [placed(place, group) for place in plan.trainers]
