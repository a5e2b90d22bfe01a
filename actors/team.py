"""All actors of a run, started from the config and taken down together."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.generator.actor import EngineSpec, Generator
from actors.placement import (
    OUTSIDE,
    ActorPlace,
    PlacementPlan,
    choose_device,
    plan_placement,
    require_resources,
    reserve,
)
from actors.scorer.actor import Scorer
from actors.scorer.client import ACTOR as SCORER_NAME
from actors.scorer.client import ScorerClient
from actors.supervision.generators import Spawn, SupervisedGenerators, actor_name
from actors.supervision.incidents import Incidents
from actors.supervision.processes import kill
from actors.supervision.stacks import FOLDER as STACKS
from actors.supervision.stacks import remove_empty
from actors.supervision.trainers import SupervisedTrainers, start_ranks
from actors.supervision.watch import watched
from actors.trainer.actor import TrainerSpec
from actors.weight_sync.canary import Canary
from actors.weight_sync.folder import weight_folder
from actors.weight_sync.manifest import checkpoint_manifest
from actors.weight_sync.publish import Publisher
from actors.weight_sync.transports import (
    LoraTransport,
    NcclTransport,
    ShmTransport,
    Transport,
    WeightTransport,
    choose_transport,
    require_room,
)
from raylign.config import OnlineDpoConfig
from raylign.models import DTYPES
from raylign.reference.checkpoint import resolve_reference
from raylign.scoring import Compute
from raylign.scoring.cache import CACHE_NAME
from raylign.scoring.identity import CODE, kept_code

log = logging.getLogger(__name__)
_SHUTDOWN_S = 20.0


@dataclass(frozen=True, slots=True)
class Team:
    """The roles, ready: every actor has loaded and joined its group."""

    generators: SupervisedGenerators
    trainers: SupervisedTrainers
    scorer: ScorerClient
    publisher: Publisher


def plan_team(config: OnlineDpoConfig, available: Mapping[str, float]) -> PlacementPlan:
    """Where every role goes. Raises PlacementError when `available`, the cluster's totals, is too little."""
    device = choose_device(config.placement, available)
    plan = plan_placement(config.placement, config.generators, config.trainer, device)
    require_resources(plan, available)
    return plan


@contextmanager
def team(
    config: OnlineDpoConfig,
    *,
    folder: str,
    pad_id: int,
    canary_ids: tuple[tuple[int, ...], ...],
    plan: PlacementPlan,
    incidents: Incidents,
) -> Iterator[Team]:
    """Start every role, yield them, and kill every process and file of theirs at the end, whatever happened."""
    with ExitStack() as stack:
        directory = stack.enter_context(weight_folder(config.run.name))
        group = reserve(plan, config.placement.ready_timeout_s)
        stack.callback(remove_placement_group, group)
        transport = choose_transport(
            config.generators.weight_sync.transport,
            device=plan.device,
            adapter=config.model.adapter_fits_checkpoint,
            own_devices=config.placement.mode == "disaggregated",
            keeps_base=config.sampling.reference_generations > 0,
        )
        mover = _transport(config, folder, transport, directory)
        incidents.memory.note()
        actors: list[ActorHandle[Any]] = []
        stack.callback(kill, actors)
        stacks = (config.run.dir / config.run.name).absolute() / STACKS
        stack.callback(remove_empty, stacks)
        generators = SupervisedGenerators(
            _spawner(config, folder, plan, group, transport, stacks),
            lambda handle: roles.publisher.catch_up(handle),
            block=config.generators,
            recovery=config.recovery,
            incidents=incidents,
            stacks=stacks,
        )
        stack.callback(lambda: kill(generators.handles))
        stack.callback(lambda: generators.shut_down(_SHUTDOWN_S))
        scorer = _start_scorer(config, plan, group, incidents, actors, stacks)
        trainers = SupervisedTrainers(
            lambda: _start_trainers(config, folder, pad_id, plan, group, stacks),
            block=config.trainer,
            loss=config.loss,
            reference=config.reference,
            adapter=config.model.lora is not None,
            incidents=incidents,
            stacks=stacks,
        )
        stack.callback(lambda: kill(trainers.handles))
        roles = _ready_team(config, generators, trainers, scorer, mover, canary_ids)
        with watched((generators, trainers, scorer), config.recovery.heartbeat_s):
            yield roles


def _ready_team(
    config: OnlineDpoConfig,
    generators: SupervisedGenerators,
    trainers: SupervisedTrainers,
    scorer: ScorerClient,
    transport: WeightTransport,
    canary_ids: tuple[tuple[int, ...], ...],
) -> Team:
    """Wait until every actor has loaded; they load at the same time."""
    sync = config.generators.weight_sync
    scorer.wait_ready()
    generators.wait_ready()
    canary = Canary(canary_ids, sync.canary_max_gap)
    publisher = Publisher(trainers, generators, transport, canary, sync.timeout_s)
    return Team(generators, trainers, scorer, publisher)


def _start_scorer(
    config: OnlineDpoConfig,
    plan: PlacementPlan,
    group: PlacementGroup,
    incidents: Incidents,
    actors: list[ActorHandle[Any]],
    stacks: Path,
) -> ScorerClient:
    run = (config.run.dir / config.run.name).absolute()
    cache, code = run / CACHE_NAME, kept_code(config.scoring, run / CODE)
    compute = Compute(max(1, int(plan.scorer.num_cpus)), plan.scorer.num_gpus > 0)

    def spawn() -> ActorHandle[Any]:
        options = Scorer.options(**placed(plan.scorer, group))
        handle: ActorHandle[Any] = options.remote(config.scoring, str(cache), str(stacks), SCORER_NAME, compute, code)
        actors.append(handle)
        return handle

    return ScorerClient(
        spawn, config.scoring, incidents, stacks=stacks, start_timeout_s=config.generators.start_timeout_s
    )


def _spawner(
    config: OnlineDpoConfig, folder: str, plan: PlacementPlan, group: PlacementGroup, transport: Transport, stacks: Path
) -> Spawn:
    """Starts the generator of a slot where the plan puts it."""
    block = config.generators
    spec = EngineSpec(
        model=folder,
        dtype=config.model.dtype,
        device=plan.device,
        transport=transport,
        lora_rank=config.model.lora.r if config.model.lora else 0,
        tensor_parallel_size=block.tensor_parallel_size,
        max_model_len=block.max_model_len,
        max_num_seqs=block.max_num_seqs,
        gpu_memory_utilization=block.gpu_memory_utilization,
        kv_cache_gb=block.kv_cache_gb,
        enforce_eager=block.enforce_eager,
        trust_remote_code=config.model.trust_remote_code,
        seed=config.run.seed,
        threads=config.placement.generator_cpus,
        stacks=str(stacks),
    )

    def spawn(slot: int) -> ActorHandle[Any]:
        handle: ActorHandle[Any] = Generator.options(**placed(plan.generators[slot], group)).remote(
            spec, actor_name(slot)
        )
        return handle

    return spawn


def _start_trainers(
    config: OnlineDpoConfig, folder: str, pad_id: int, plan: PlacementPlan, group: PlacementGroup, stacks: Path
) -> list[ActorHandle[Any]]:
    """Every rank, once the group has formed. Raises ActorsLost; a port that was taken meanwhile is tried again."""
    spec = TrainerSpec(
        folder=folder,
        reference_folder=resolve_reference(config.reference, config.model, folder),
        pad_id=pad_id,
        model=config.model,
        trainer=config.trainer,
        loss=config.loss,
        reference=config.reference,
        rounds=config.rounds,
        seed=config.run.seed,
        threads=config.placement.trainer_cpus,
        on_gpu=plan.device == "gpu",
        stacks=str(stacks),
    )
    return start_ranks(spec, [placed(place, group) for place in plan.trainers])


def placed(place: ActorPlace, group: PlacementGroup) -> dict[str, Any]:
    """Ray's options of an actor at its place."""
    amounts = {"num_cpus": place.num_cpus, "num_gpus": place.num_gpus}
    if place.bundle == OUTSIDE:
        return amounts
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place.bundle)
    return {**amounts, "scheduling_strategy": strategy}


def _transport(config: OnlineDpoConfig, folder: str, transport: Transport, directory: Path) -> WeightTransport:
    """Raises WeightSyncError when a push would not fit, before anything is started."""
    match transport:
        case "shm":
            made = ShmTransport(directory, checkpoint_manifest(Path(folder)), DTYPES[config.model.dtype].itemsize)
            require_room(directory, made.needed_bytes)
            return made
        case "lora":
            return LoraTransport(directory)
        case "nccl":
            return NcclTransport(config.generators.count * config.generators.tensor_parallel_size)
