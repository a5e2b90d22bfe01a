"""All actors of a run, started from the config and taken down together."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.generator.actor import EngineSpec, GeneratorActor
from actors.placement import OUTSIDE, ActorPlace, PlacementPlan
from actors.scorer.client import ACTOR as SCORER_NAME
from actors.scorer.client import ScorerActor, ScorerClient
from actors.supervision.cures import Role
from actors.supervision.generators import SupervisedGenerators, actor_name
from actors.supervision.incidents import Incidents
from actors.supervision.processes import FOLDER as STACKS
from actors.supervision.processes import kill, remove_empty
from actors.supervision.slot import Supervision
from actors.supervision.trainers import SupervisedTrainers, start_ranks
from actors.supervision.turns import OwnDevices, SharedDevices, Turns
from actors.supervision.watch import Replaceable, watched
from actors.trainer.actor import TrainerSpec
from actors.weight_sync.nodes import node_folders
from actors.weight_sync.publish import Canary, OneEngine, WeightPublisher
from actors.weight_sync.transports import EngineEnd, LoraTransport, ShmTransport, WeightTransport, weight_transport
from raylign.config import EvaluateConfig, OnlineDpoConfig, RunConfig
from raylign.config.blocks import ModelBlock
from raylign.config.losses import loss_functions
from raylign.errors import GeneratorError, PlacementError, RaylignError, ScorerError, TrainerError
from raylign.reference.checkpoint import resolve_reference
from raylign.roles import Engines, Generator, NodePath, ScorerProcess
from raylign.run.sources import CODE, kept_code
from raylign.scoring.base import Compute
from raylign.scoring.cache import CACHE_NAME
from raylign.scoring.load import functions_of

_SHUTDOWN_S = 20.0
CHECKPOINT_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ActorTeam:
    """A `raylign.roles.Team` of actors: every one has loaded and joined its group."""

    generators: SupervisedGenerators
    trainers: SupervisedTrainers
    scorer: ScorerClient
    publisher: WeightPublisher


@dataclass(frozen=True, slots=True)
class _Start:
    """What every role needs to start; `stack` ends what was started, in reverse order."""

    config: RunConfig
    folder: str
    pad_id: int
    plan: PlacementPlan
    incidents: Incidents
    group: PlacementGroup
    stack: ExitStack

    @property
    def run(self) -> Path:
        """The run directory."""
        return (self.config.run.dir / self.config.run.name).absolute()

    @property
    def nodes(self) -> Sequence[str]:
        """Ray's ids of the nodes where generators and the ranks are."""
        of_bundle = placement_group_table(self.group)["bundles_to_node_id"]
        return [of_bundle[place.bundle] for place in (*self.plan.generators, *self.plan.trainers)]

    def supervision(self, role: Role, error: type[RaylignError]) -> Supervision:
        return Supervision(role, error, self.incidents, self.run / STACKS)

    def options(self, place: ActorPlace) -> dict[str, Any]:
        """Ray's options of an actor at its place."""
        amounts = {"num_cpus": place.num_cpus, "num_gpus": place.num_gpus}
        if place.bundle == OUTSIDE:
            return amounts
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=place.bundle)
        return {**amounts, "scheduling_strategy": strategy}


@contextmanager
def _starting(
    config: RunConfig, folder: str, pad_id: int, plan: PlacementPlan, incidents: Incidents
) -> Iterator[_Start]:
    """Reserve what the plan says; every process and file of the roles is gone at the end, whatever happened."""
    with ExitStack() as stack:
        group = reserve(plan, config.placement.ready_timeout_s)
        stack.callback(remove_placement_group, group)
        incidents.memory.note()
        start = _Start(config, folder, pad_id, plan, incidents, group, stack)
        stack.callback(remove_empty, start.run / STACKS)
        yield start


@contextmanager
def team(
    config: OnlineDpoConfig,
    *,
    folder: str,
    pad_id: int,
    canary_ids: tuple[tuple[int, ...], ...],
    plan: PlacementPlan,
    incidents: Incidents,
) -> Iterator[ActorTeam]:
    """Start every role at the same time, wait until all have loaded, yield them, and take them down at the end."""
    sync = config.generators.weight_sync
    with _starting(config, folder, pad_id, plan, incidents) as start:
        folders = start.stack.enter_context(node_folders(config.run.name, start.nodes, sync.timeout_s))
        transport = weight_transport(config, folder, plan, folders)
        folders.require_room(transport.needed_bytes)
        turns = _turns(config, plan, transport)
        generators = _start_generators(config, config.model, start, transport.engine, turns)
        scorer = _start_scorer(config, start)
        if isinstance(turns, SharedDevices):
            # vLLM measures what is free, and takes its share: trainers would be counted as its own, or be in its way.
            generators.wait_ready()
            turns.engines_started(generators)
        trainers = _start_trainers(start, turns)
        if isinstance(turns, SharedDevices):
            turns.movers = trainers
        canary = Canary(canary_ids, sync.canary_max_gap)
        publisher = WeightPublisher(trainers, generators, transport, canary, sync.timeout_s, turns)
        scorer.wait_ready()
        generators.wait_ready()
        generators.bring_newcomers_up_to_date(publisher.catch_up)
        # Who takes turns is replaced when its turn comes: between them its GPU is another one's.
        idle: Sequence[Replaceable] = (scorer,) if turns.shared else (generators, trainers, scorer)
        with watched(idle, config.recovery.heartbeat_s):
            yield ActorTeam(generators, trainers, scorer, publisher)


@contextmanager
def trainer_team(
    config: RunConfig,
    *,
    folder: str,
    pad_id: int,
    plan: PlacementPlan,
    incidents: Incidents,
) -> Iterator[SupervisedTrainers]:
    """The same with trainers alone, for recipes that train on a data set."""
    with _starting(config, folder, pad_id, plan, incidents) as start:
        trainers = _start_trainers(start, OwnDevices())
        with watched((trainers,), config.recovery.heartbeat_s):
            yield trainers


@dataclass(frozen=True, slots=True)
class Served:
    """A policy for generators: the model in `folder`, as `model` says, with the weights of a run's checkpoint.

    `checkpoint` holds an adapter where `model.lora` is set, else model.safetensors; None is the model as it is, which
    is version 0. `adapted` asks for an engine that takes adapters.
    """

    folder: str
    model: ModelBlock
    checkpoint: Path | None
    version: int
    adapted: bool

    @property
    def engine(self) -> EngineEnd:
        """How its weights come to an engine that has loaded the model."""
        return LoraTransport.engine if self.adapted else ShmTransport.engine

    def may_follow(self, other: "Served") -> bool:
        """Whether engines that serve `other` can serve this one next: they never go back to the model as it is."""
        same = (self.folder, self.model, self.adapted) == (other.folder, other.model, other.adapted)
        return same and (self.checkpoint is not None or other.checkpoint is None)

    def bring(self, engines: Engines, timeout_s: float) -> None:
        """Let engines serve the checkpoint. Raises GeneratorError."""
        if self.checkpoint is None:
            return
        path = NodePath(str(self.checkpoint))
        if self.model.lora:
            engines.call("loading the adapter", timeout_s, Generator.take_adapter, path, self.version)
        else:
            file = path.inside(CHECKPOINT_WEIGHTS)
            engines.call("loading weights", timeout_s, Generator.take_weights, file, self.version)


class Answering:
    """Generators alone, which serve policies that nobody trains, one after the other.

    Those of one model are served by the same engines; whoever is replaced is brought to the present one too.
    """

    def __init__(self, config: EvaluateConfig, plan: PlacementPlan, incidents: Incidents) -> None:
        self._config, self._plan, self._incidents = config, plan, incidents
        self._timeout_s = config.generators.weight_sync.timeout_s
        self._open = ExitStack()
        self._now: tuple[Served, SupervisedGenerators] | None = None

    def serve(self, served: Served) -> SupervisedGenerators:
        """Until the next one is served. Raises GeneratorError."""
        if self._now is not None and served.may_follow(self._now[0]):
            generators = self._now[1]
        else:
            self.close()
            start = self._open.enter_context(_starting(self._config, served.folder, 0, self._plan, self._incidents))
            generators = _start_generators(self._config, served.model, start, served.engine, OwnDevices())
            generators.wait_ready()
            self._open.enter_context(watched((generators,), self._config.recovery.heartbeat_s))
        self._now = served, generators
        generators.bring_newcomers_up_to_date(
            lambda handle: served.bring(OneEngine([handle], OwnDevices()), self._timeout_s)
        )
        served.bring(generators, self._timeout_s)
        return generators

    def close(self) -> None:
        """End the engines. Others start where one is served again."""
        self._now = None
        self._open.close()


@contextmanager
def scorer_team(config: EvaluateConfig, plan: PlacementPlan, incidents: Incidents) -> Iterator[ScorerClient]:
    """The scorer alone."""
    with _starting(config, "", 0, plan, incidents) as start:
        scorer = _start_scorer(config, start)
        scorer.wait_ready()
        with watched((scorer,), config.recovery.heartbeat_s):
            yield scorer


def _turns(config: OnlineDpoConfig, plan: PlacementPlan, transport: WeightTransport) -> Turns:
    if plan.takes_turns and config.generators.enable_sleep_mode:
        return SharedDevices(replaces=transport.engine.backend is not None)
    return OwnDevices()


def _start_generators(
    config: OnlineDpoConfig | EvaluateConfig, model: ModelBlock, start: _Start, transport: EngineEnd, turns: Turns
) -> SupervisedGenerators:
    block = config.generators
    spec = EngineSpec(
        model=start.folder,
        dtype=model.dtype,
        device=start.plan.device,
        transport=transport,
        lora_rank=model.lora.r if model.lora else 0,
        tensor_parallel_size=block.tensor_parallel_size,
        max_model_len=block.max_model_len,
        max_num_seqs=block.max_num_seqs,
        gpu_memory_utilization=block.gpu_memory_utilization,
        kv_cache_gb=block.kv_cache_gb,
        enforce_eager=start.plan.device == "cpu" if block.enforce_eager is None else block.enforce_eager,
        sleeps=turns.shared,
        trust_remote_code=model.trust_remote_code,
        seed=config.run.seed,
        threads=config.placement.generator_cpus,
        stacks=str(start.run / STACKS),
    )

    places = start.plan.generators

    def spawn(slot: int) -> ActorHandle[Generator]:
        handle: ActorHandle[Generator] = GeneratorActor.options(**start.options(places[slot])).remote(
            spec, actor_name(slot)
        )
        return handle

    supervision = start.supervision("generator", GeneratorError)
    generators = SupervisedGenerators(
        spawn, block=block, recovery=config.recovery, supervision=supervision, turns=turns
    )
    start.stack.callback(lambda: kill(generators.handles))
    start.stack.callback(generators.shut_down, _SHUTDOWN_S)
    return generators


def _start_scorer(config: OnlineDpoConfig | EvaluateConfig, start: _Start) -> ScorerClient:
    gold = config.evaluation.gold if isinstance(config, OnlineDpoConfig) else None
    functions = functions_of(config.scoring) | (set() if gold is None else functions_of(gold))
    cache, code = start.run / CACHE_NAME, kept_code(functions, start.run / CODE)
    place = start.plan.scorer
    compute = Compute(max(1, int(place.num_cpus)), place.num_gpus > 0)

    def spawn() -> ActorHandle[ScorerProcess]:
        handle: ActorHandle[ScorerProcess] = ScorerActor.options(**start.options(place)).remote(
            config.scoring, str(cache), str(start.run / STACKS), SCORER_NAME, compute, code, gold
        )
        return handle

    supervision = start.supervision("scorer", ScorerError)
    timeout_s = config.generators.start_timeout_s
    scorer = ScorerClient(spawn, config.scoring, supervision, start_timeout_s=timeout_s, gold=gold)
    start.stack.callback(lambda: kill(scorer.handles))
    return scorer


def _start_trainers(start: _Start, turns: Turns) -> SupervisedTrainers:
    config, plan = start.config, start.plan
    loss, reference = config.objective, config.measured_against
    spec = TrainerSpec(
        folder=start.folder,
        reference_folder=resolve_reference(reference, config.model, start.folder),
        pad_id=start.pad_id,
        model=config.model,
        trainer=config.trainer,
        loss=loss,
        reference=reference,
        rounds=config.rounds,
        seed=config.run.seed,
        threads=config.placement.trainer_cpus,
        on_gpu=plan.device == "gpu",
        stacks=str(start.run / STACKS),
        max_completion_tokens=config.max_completion_tokens,
        code=kept_code(loss_functions(loss), start.run / CODE),
    )
    trainers = SupervisedTrainers(
        lambda: start_ranks(spec, [start.options(place) for place in plan.trainers]),
        block=config.trainer,
        loss=loss,
        reference=reference,
        adapter=config.model.lora is not None,
        supervision=start.supervision("trainer", TrainerError),
        turns=turns,
    )
    start.stack.callback(lambda: kill(trainers.handles))
    return trainers


def reserve(plan: PlacementPlan, timeout_s: float) -> PlacementGroup:
    """The bundles as a ready placement group. Raises PlacementError when they are not free within `timeout_s`."""
    group: PlacementGroup = placement_group([dict(bundle) for bundle in plan.bundles], strategy="PACK")
    try:
        ray.get(group.ready(), timeout=timeout_s)
    except GetTimeoutError as cause:
        remove_placement_group(group)
        free = json.dumps({name: n for name, n in ray.available_resources().items() if name in ("CPU", "GPU")})
        raise PlacementError(
            f"placement of {json.dumps(plan.bundles)} was not ready within {timeout_s:g} s; free now: {free}; "
            "another job may hold them, or no single node fits a bundle"
        ) from cause
    return group
