"""What a run holds in the memory of its devices, phase by phase, and whether that fits.

`raylign.training.memory` has the formulas.

Colocated, generator and trainer take turns on a GPU: the trainer's tensors are in host memory while it samples, and the
engine sleeps while it trains, of which its context stays. For a publish the trainer's weights are there beside those of
the engine, which has no KV cache then. Disaggregated, each has its own GPU and keeps what it has. On CPUs everything is
there all the time. An evaluation has the engine of one side at a time, then the scorer.
"""

import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from actors.placement import OUTSIDE, Device, PlacementPlan
from actors.weight_sync.manifest import checkpoint_manifest, file_manifest
from raylign.config import EvaluateConfig, OnlineDpoConfig, RunConfig
from raylign.config.blocks import GeneratorsBlock, PlacementBlock
from raylign.config.scoring import LeafBlock, leaves
from raylign.config.scoring.blocks import ImplicitScoringBlock, RewardModelScoringBlock
from raylign.errors import PlacementError
from raylign.models.open import read_config
from raylign.records import Preference, Prompt
from raylign.training.memory import CURES, GIB, Cure, ModelSize, TrainerNeeds, size_of, trainer_cures
from recipes.commands.plan import reference_facts
from recipes.model_checks import trained_parameters
from recipes.sides import Found

_ENGINE_CONTEXT = GIB
"""Of an engine besides weights and KV cache, awake or asleep: CUDA's context, graphs and buffers. Not measured."""
_TRAINER_CONTEXT = GIB // 2
"""CUDA's context of a rank."""
_ADAPTER = "adapter_model.safetensors"
_QUERY_TIMEOUT_S = 15.0
_ESTIMATED = "*"
"""Marks rows of the engine and the scorer."""
_WEIGHTS, _KV, _CONTEXT, _SCORER = (
    f"{name}{_ESTIMATED}" for name in ("engine weights", "KV cache", "engine context", "scorer")
)
_ENGINE = (_WEIGHTS, _KV, _CONTEXT)


@dataclass(frozen=True, slots=True)
class Phase:
    """What one device holds in a phase of a round, in bytes by row; `cures` are what would shrink it, best first."""

    where: str
    name: str
    rows: Mapping[str, int]
    cures: tuple[Cure, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.rows.values())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Made by `memory_plan`. `each` is the memory of a GPU in bytes, None where it is not known or there is none.

    `host` are bytes of every rank that offloading keeps in host memory. `share` is what an engine may take of a GPU.
    """

    device: Device
    phases: tuple[Phase, ...]
    each: int | None
    host: int
    share: float = 1.0

    def require_fit(self) -> None:
        """Raises PlacementError when a phase needs more than a GPU has, with the three settings that help most."""
        if self.each is None:
            return
        for phase in self.phases:
            engine = {name: size for name, size in phase.rows.items() if name in _ENGINE}
            if sum(engine.values()) > int(self.share * self.each):
                share = f"generators.gpu_memory_utilization={self.share:g} of {gib(self.each)} GiB"
                more = f"raise generators.gpu_memory_utilization; {_listed(phase, CURES - 1)}"
                raise PlacementError(
                    f"an engine needs {gib(sum(engine.values()))} GiB ({_largest(engine)}), and {share} is less; what "
                    f"would help: {more}"
                )
            if phase.total > self.each:
                raise PlacementError(
                    f"{phase.name} needs {gib(phase.total)} GiB of a GPU of the {phase.where}, which has "
                    f"{gib(self.each)} (GiB: {_largest(phase.rows)}); what would help: {_listed(phase, CURES)}"
                )


def _largest(rows: Mapping[str, int]) -> str:
    found = sorted(rows.items(), key=lambda row: -row[1])[:CURES]
    return ", ".join(f"{name.rstrip(_ESTIMATED)} {gib(size)}" for name, size in found)


def _listed(phase: Phase, most: int) -> str:
    """Those that free a hundredth of it."""
    cures = [cure for cure in phase.cures if 100 * cure.frees > phase.total][:most]
    return "; ".join(map(str, cures)) or "take GPUs with more memory"


@dataclass(frozen=True, slots=True)
class Subject:
    """The model in `folder`, of which `trained` parameters get gradients, and the prompts or preferences for it."""

    folder: Path
    trained: int
    rows: Sequence[object]


@dataclass(frozen=True, slots=True)
class Engine:
    """A model that vLLM serves, of `itemsize` bytes a weight, with an adapter of so many weights."""

    size: ModelSize
    itemsize: int
    adapter: int
    device: Device


def memory_plan(config: RunConfig, subject: Subject, placement: PlacementPlan, each: int | None) -> MemoryPlan:
    """`each` is that of `gpu_bytes`."""
    needs = trainer_needs(config, subject, placement.device)
    memory = each if placement.device == "gpu" else None
    if not isinstance(config, OnlineDpoConfig):
        phases: tuple[Phase, ...] = (_alone(needs),)
    elif placement.device == "cpu":
        rows = _engine_on_host(config.generators, _engine(needs))
        phases = (Phase("generator", "all phases", rows), Phase("trainer rank", "all phases", needs.rows()))
    else:
        phases = _on_gpus(config, needs, placement, memory)
        return MemoryPlan("gpu", phases, memory, needs.host(), config.generators.gpu_memory_utilization)
    return MemoryPlan(placement.device, phases, memory, needs.host())


def evaluation_memory(
    config: EvaluateConfig, sides: Sequence[Found], answering: PlacementPlan, scoring: PlacementPlan, each: int | None
) -> MemoryPlan:
    """Of the sides that are sampled, one after the other, and of a scorer on a GPU, which starts when they are gone."""
    block, memory = config.generators, each if answering.device == "gpu" else None
    found: dict[tuple[tuple[str, int], ...], list[Found]] = {}
    for side in (one for one in sides if one.given is None):
        engine = _served(side, config, answering.device)
        rows = _engine_rows(block, engine, memory) if engine.device == "gpu" else _engine_on_host(block, engine)
        found.setdefault(tuple(rows.items()), []).append(side)
    phases = [
        Phase(
            "generator",
            f"answering as {', '.join(side.name for side in alike)}",
            dict(rows),
            _sorted(*_engine_cures(block, _served(alike[0], config, answering.device), memory, 0, "")),
        )
        for rows, alike in found.items()
    ]
    if answering.device == "gpu" and scoring.scorer.num_gpus:
        rows = {_SCORER: _scorer_bytes(leaves(config.scoring), config.placement, memory)}
        phases.append(Phase("scorer", "scoring", rows, _scorer_cures(rows)))
    return MemoryPlan(answering.device, tuple(phases), memory, 0, block.gpu_memory_utilization)


def _served(side: Found, config: EvaluateConfig, device: Device) -> Engine:
    folder = Path(side.folder)
    size = size_of(checkpoint_manifest(folder), read_config(side.folder, side.model.trust_remote_code))
    files = [*side.checkpoint.glob(_ADAPTER)] if side.checkpoint else []
    adapter = sum(math.prod(shape) for file in files for shape in file_manifest(file).values())
    return Engine(size, side.model.itemsize, adapter, device)


def trainer_needs(config: RunConfig, subject: Subject, device: Device) -> TrainerNeeds:
    folder, trained = subject.folder, subject.trained
    size = size_of(checkpoint_manifest(folder), read_config(str(folder), config.model.trust_remote_code))
    reference = reference_facts(config, folder, trained).bytes_per_rank
    longest = max((_tokens(row, config) for row in subject.rows), default=0)
    if isinstance(config, OnlineDpoConfig):
        candidates = 2 if config.pairing.pairs else config.sampling.max_generations
    else:
        candidates = max((len(row.candidates) for row in subject.rows if isinstance(row, Preference)), default=1)
    return TrainerNeeds(size, trained, config.model, config.trainer, longest, candidates, reference, device)


def _tokens(row: object, config: RunConfig) -> int:
    """Of the longest sequence that comes of it."""
    match row:
        case Prompt():
            return len(row.token_ids) + (config.max_completion_tokens or 0)
        case Preference():
            return len(row.prompt.token_ids) + max(len(candidate.token_ids) for candidate in row.candidates)
        case _:
            return config.longest[1]


def begin_check(config: RunConfig, folder: str, rows: Sequence[object]) -> Callable[[PlacementPlan], None]:
    """Count what torch must; what is returned raises PlacementError where the GPUs' memory is known and too little."""
    each = gpu_bytes(config.placement)
    if each is None or config.placement.device == "cpu":
        return lambda placement: None
    subject = Subject(Path(folder), trained_parameters(folder, config.model), rows)
    return lambda placement: memory_plan(config, subject, placement, each).require_fit()


def gpu_bytes(block: PlacementBlock) -> int | None:
    """Memory of each GPU: as `placement.gpu_memory_gb` says, else of this machine's smallest; None if not known."""
    if block.gpu_memory_gb is not None:
        return int(block.gpu_memory_gb * GIB)
    program = shutil.which("nvidia-smi")
    if program is None or "RAY_ADDRESS" in os.environ:
        return None
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=False).stdout
    except subprocess.TimeoutExpired:
        return None
    found = [int(line) << 20 for line in told.split() if line.isdigit()]
    return min(found, default=None)


def _on_gpus(
    config: OnlineDpoConfig, needs: TrainerNeeds, placement: PlacementPlan, memory: int | None
) -> tuple[Phase, ...]:
    """Of the GPU that has most on it: the first generator's, with the scorer where that shares it."""
    engine = _engine_rows(config.generators, _engine(needs), memory)
    asleep = {_CONTEXT: engine[_CONTEXT]}
    without_cache = {name: size for name, size in engine.items() if name != _KV}
    shared = placement.scorer.bundle != OUTSIDE and placement.scorer.num_gpus > 0
    scorer = {_SCORER: _scorer_bytes(config.scorers, config.placement, memory)} if shared else {}
    context = {"trainer context": _TRAINER_CONTEXT}
    others = _TRAINER_CONTEXT + sum(scorer.values())
    turns = "" if config.placement.mode == "disaggregated" else " with placement.mode=disaggregated"
    cures = _sorted(*_engine_cures(config.generators, _engine(needs), memory, others, turns), *_scorer_cures(scorer))
    if config.placement.mode == "disaggregated":
        both = (Phase("generator", name, engine | scorer, cures) for name in ("sampling", "publishing"))
        return (*both, _alone(needs))
    where, weights = "generator and trainer", needs.rows()["weights"]

    def apart(frees: int) -> Cure:
        return Cure("placement.mode=disaggregated", frees)

    of_trainer = _sorted(*trainer_cures(needs), apart(asleep[_CONTEXT]), *_scorer_cures(scorer))
    of_both = _sorted(apart(weights + _TRAINER_CONTEXT), *_scorer_cures(scorer))
    if not config.generators.enable_sleep_mode:
        awake = Cure("generators.enable_sleep_mode=true", min(sum(needs.rows().values()), sum(engine.values())))
        everything = engine | needs.rows() | context | scorer
        return (Phase(where, "all of a round", everything, _sorted(awake, *cures, *of_trainer)),)
    return (
        Phase(where, "sampling", engine | context | scorer, cures),
        Phase(where, "training", {**asleep, **needs.rows(), **context, **scorer}, of_trainer),
        Phase(where, "publishing", without_cache | {"weights": weights} | context | scorer, of_both),
    )


def _sorted(*cures: Cure) -> tuple[Cure, ...]:
    """The best first."""
    return tuple(sorted((cure for cure in cures if cure.frees > 0), key=lambda cure: -cure.frees))


def _alone(needs: TrainerNeeds) -> Phase:
    """Of a GPU (or of the host, where there is none) that only a rank is on."""
    context = {"trainer context": _TRAINER_CONTEXT} if needs.device == "gpu" else {}
    where = "trainer" if needs.device == "gpu" else "trainer rank"
    return Phase(where, "training", {**needs.rows(), **context}, tuple(trainer_cures(needs)))


def _engine(needs: TrainerNeeds) -> Engine:
    """That of the policy in training."""
    adapter = needs.trained if needs.model.adapter_fits_checkpoint else 0
    return Engine(needs.size, needs.model.itemsize, adapter, needs.device)


def _engine_on_host(block: GeneratorsBlock, engine: Engine) -> dict[str, int]:
    """Of an engine on CPUs."""
    return _engine_rows(block, engine, None) | {_KV: int(block.kv_cache_gb * GIB)}


def _engine_rows(block: GeneratorsBlock, engine: Engine, memory: int | None) -> dict[str, int]:
    """Of an engine on one GPU, awake: its KV cache takes what `gpu_memory_utilization` leaves, a sequence at least."""
    width = block.tensor_parallel_size
    weights = (engine.size.parameters + engine.adapter) * engine.itemsize // width
    context = _ENGINE_CONTEXT if engine.device == "gpu" else 0
    least = engine.size.kv_bytes(engine.itemsize) // width * block.max_model_len
    left = 0 if memory is None else int(block.gpu_memory_utilization * memory) - weights - context
    rows = {_WEIGHTS: weights, _KV: max(left, least)}
    return rows | ({_CONTEXT: context} if context else {})


def _engine_cures(block: GeneratorsBlock, engine: Engine, memory: int | None, others: int, apart: str) -> list[Cure]:
    """What would shrink an engine beside `others` bytes of its GPU: its share, or what it needs at least.

    `apart` is what several GPUs for an engine ask for besides.
    """
    whole, least = (sum(_engine_rows(block, engine, known).values()) for known in (memory, None))
    half, width = block.max_model_len // 2, 2 * block.tensor_parallel_size
    tries: dict[str, dict[str, int]] = {
        f"generators.max_model_len={half}": {"max_model_len": half},
        f"generators.tensor_parallel_size={width}{apart}": {"tensor_parallel_size": width},
    }
    found = [
        Cure(name, least - sum(_engine_rows(block.model_copy(update=options), engine, None).values()))
        for name, options in tries.items()
    ]
    if memory is not None and (room := memory - others) >= least:
        share = math.floor(100 * room / memory) / 100
        found.append(Cure(f"generators.gpu_memory_utilization={share:g}", whole - int(share * memory)))
    return found


def _scorer_cures(scorer: Mapping[str, int]) -> tuple[Cure, ...]:
    return tuple(Cure("placement.scorer_gpus=0", size) for size in scorer.values())


def _scorer_bytes(scorers: Iterable[LeafBlock], placement: PlacementBlock, memory: int | None) -> int:
    """Of the files of its models that are here, else its share of the GPU."""
    folders = [Path(path) for leaf in scorers for path in _paths(leaf)]
    if folders and all(folder.is_dir() for folder in folders):
        return sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    return int(placement.scorer_gpus * (memory or 0))


def _paths(block: object) -> Iterable[str]:
    match block:
        case RewardModelScoringBlock():
            return (block.path,)
        case ImplicitScoringBlock():
            return dict.fromkeys((block.policy_path, block.reference_path))
        case _:
            return ()


def memory_table(plan: MemoryPlan) -> Table:
    """GiB by row; a column is a phase on a device."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column(f"GiB of a {'GPU' if plan.device == 'gpu' else 'process'}")
    for phase in plan.phases:
        table.add_column(f"{phase.where}\n{phase.name}", justify="right")
    for name in dict.fromkeys(name for phase in plan.phases for name in phase.rows):
        table.add_row(name, *(gib(phase.rows[name]) if name in phase.rows else "" for phase in plan.phases))
    table.add_section()
    table.add_row("together", *(gib(phase.total) for phase in plan.phases))
    if plan.each is not None:
        table.add_row("of", *(gib(plan.each) for _ in plan.phases))
    return table


def memory_notes(plan: MemoryPlan) -> list[str]:
    """What the table does not say by itself."""
    found = ["rows with * are estimates until an engine was measured on a GPU"] if plan.device == "gpu" else []
    if gib(plan.host) != gib(0):
        found.append(f"offloaded: {gib(plan.host)} GiB of host memory for every trainer rank")
    if plan.device == "gpu" and plan.each is None:
        found.append("how much memory a GPU has is not known here: set placement.gpu_memory_gb to see whether it fits")
    return found


def gib(size: int) -> str:
    return f"{size / GIB:.2f}"
