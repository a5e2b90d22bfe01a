"""What a recipe would run, found out without starting an actor or loading weights: what all plans have in common."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from actors.weight_sync.manifest import checkpoint_manifest
from raylign.config import RunConfig
from raylign.config.blocks import ModelBlock, PlacementBlock
from raylign.config.capability import CapabilityBlock
from raylign.config.losses import TrainerLoss, loss_functions, members
from raylign.config.reference import (
    EmaReferenceBlock,
    EveryReferenceBlock,
    InitialReferenceBlock,
    ModelReferenceBlock,
    NoReferenceBlock,
    PreviousRoundReferenceBlock,
    SamplerReferenceBlock,
)
from raylign.evaluation.capability.likelihood import Measured
from raylign.evaluation.guard import consequence
from raylign.export.card import loss_name
from raylign.models import context_limit
from raylign.reference.checkpoint import resolve_reference
from raylign.report.text import escape_control
from raylign.scoring.locate import locate_function
from raylign.training.memory import frozen_bytes
from recipes.commands.checks.ray_cluster import require_named_cluster
from recipes.model_checks import gpus, linear_parameters, trained_parameters

THIS_MACHINE = "this machine"


Line = tuple[str, str]


_FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The policy: where it is, its parameters (those of a tied output head once) and how many of them train."""

    folder: Path
    parameters: int
    trained: int
    context: int


def model_facts(folder: Path, block: ModelBlock) -> ModelFacts:
    """Count the parameters of `block`, whose checked files are in `folder`, by their headers. Raises ModelError."""
    parameters = sum(math.prod(shape) for shape in checkpoint_manifest(folder).values())
    trained = trained_parameters(str(folder), block)
    return ModelFacts(folder, parameters, trained, context_limit(str(folder), block.trust_remote_code))


@dataclass(frozen=True, slots=True)
class ReferenceFacts:
    """What the reference is, in words, and the bytes that every trainer rank holds for it."""

    what: str
    bytes_per_rank: int


def reference_facts(config: RunConfig, folder: Path, trained: int) -> ReferenceFacts:
    """`folder` is the policy's and `trained` its parameters with gradients. Raises ModelError as a run would."""
    reference, adapter = config.measured_against, config.model.lora is not None
    found = resolve_reference(reference, config.model, str(folder))
    whole = stored_bytes(Path(found), config.model)
    shards = config.trainer.ranks if config.trainer.zero_stage == 3 else 1
    copy, mix = math.ceil(whole / shards), math.ceil(trained * _FP32_BYTES / shards)
    followed = trained * _FP32_BYTES if adapter else copy
    match reference:
        case InitialReferenceBlock():
            what = "the policy without its adapter" if adapter else "a frozen copy of the model before round 1"
            return ReferenceFacts(what, 0 if adapter else copy)
        case PreviousRoundReferenceBlock():
            return ReferenceFacts("the policy at the start of each round", followed)
        case EveryReferenceBlock():
            return ReferenceFacts(f"the policy of up to {reference.n} rounds ago, renewed that often", followed)
        case EmaReferenceBlock():
            what = f"a moving average that takes {reference.alpha:g} of the policy after every round"
            return ReferenceFacts(what, followed + (0 if adapter else mix))
        case ModelReferenceBlock():
            return ReferenceFacts(f"{reference.path}, frozen", copy)
        case SamplerReferenceBlock():
            return ReferenceFacts("the sampling policy, by the log-probs it sampled with", 0)
        case NoReferenceBlock():
            return ReferenceFacts("none", 0)


def stored_bytes(folder: Path, block: ModelBlock) -> int:
    """Bytes of the frozen model of `folder` as a trainer holds it, in `block.dtype` and 4 bits as `block` says."""
    parameters = sum(math.prod(shape) for shape in checkpoint_manifest(folder).values())
    return frozen_bytes(parameters, linear_parameters(str(folder), block) if block.load_in_4bit else 0, block)


def present_resources(block: PlacementBlock) -> tuple[str, Mapping[str, float]]:
    """Whose resources they are, and the CPUs and GPUs: of the cluster at RAY_ADDRESS, else of this machine.

    With `gpu_memory_gb`, a machine without GPUs stands for a cluster of such GPUs, however many.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        here = gpus()
        if not here and block.gpu_memory_gb is not None and block.device != "cpu":
            return f"a cluster of GPUs of {block.gpu_memory_gb:g} GiB", {"CPU": math.inf, "GPU": math.inf}
        return THIS_MACHINE, {"CPU": float(os.cpu_count() or 1), "GPU": float(here)}
    from actors.cluster import cluster  # noqa: PLC0415 - Ray, where there is a cluster to ask

    require_named_cluster()
    with cluster() as available:
        return f"the cluster at {address}", dict(available)


def run_directory(config: RunConfig) -> Path:
    return (config.run.dir / config.run.name).absolute()


def grid(lines: Iterable[Line]) -> Table:
    """`name value` lines, the names in bold."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=13)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(Text(name, style="bold"), Text(escape_control(value)))
    return table


def needed(required: Mapping[str, float], available: Mapping[str, float]) -> str:
    """What is required of each resource, and how much there is where that is known."""
    parts = [(f"{need:g} {name}", available.get(name, 0.0)) for name, need in required.items()]
    return ", ".join(part if math.isinf(there) else f"{part} of {there:g}" for part, there in parts)


def many(count: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def capability_lines(tasks: Sequence[Measured], block: CapabilityBlock | None) -> list[Line]:
    """What is measured of it, and when; no line where nothing is."""
    if block is None:
        return []
    each = f", every {many(block.every, 'round')}" if block.every else ""
    named = ", ".join(f"{task.name} ({many(task.items, 'item')})" for task in tasks)
    return [("", f"capability: {named}, before round 1{each} and after the last")]


def guard_lines(config: RunConfig) -> list[Line]:
    """What is watched after each round, by what the best version is chosen and when the run ends without a better."""
    lines: list[Line] = []
    for rule in config.rules:
        later = f", from round {rule.after_rounds + 1} on" if rule.after_rounds else ""
        lines.append(("" if lines else "guard", f"{rule.measure} {rule.bound}{later}: {consequence(rule)}"))
    if (choice := config.choice) is None:
        return lines
    order = "highest" if choice.greater_is_better else "lowest"
    kept = "its checkpoint stays, raylign export --version best takes it"
    lines.append(("best version", f"the one with the {order} {choice.metric_for_best_model}: {kept}"))
    if (patience := choice.early_stopping_patience) is not None:
        better = f"better by more than {gain:g}" if (gain := choice.early_stopping_threshold) else "better"
        lines.append(("", f"the run ends once {many(patience, 'round')} in a row gave none that was {better}"))
    return lines


def loss_lines(loss: TrainerLoss) -> list[Line]:
    """The loss, and of a user's function where it stands and its hash. Raises ScorerError when it cannot be found."""
    lines = [("loss", " + ".join(loss_name(block) for block in members(loss)))]
    for function in loss_functions(loss):
        info = locate_function(function, option="loss.function")
        lines += [("", f"{function}: {info.file}:{info.line}"), ("", f"sha256 {info.sha256}")]
    return lines
