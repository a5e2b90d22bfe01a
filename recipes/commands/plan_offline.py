"""What a recipe on a data set would run, found out without starting an actor or loading weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from actors.placement import PlacementPlan, plan_trainer_team
from raylign.config import OfflineConfig
from raylign.data.preferences import PreferenceData, mixed_scales
from raylign.data.split import total_steps
from raylign.evaluation.capability.likelihood import Measured
from raylign.prompts import left_out
from raylign.tracking.uri import default_uri
from recipes.capability import find_tasks
from recipes.commands.plan import (
    Line,
    ModelFacts,
    capability_lines,
    grid,
    guard_lines,
    loss_lines,
    many,
    model_facts,
    needed,
    present_resources,
    run_directory,
)
from recipes.memory import MemoryPlan, Subject, gpu_bytes, memory_notes, memory_plan, memory_table
from recipes.opening import find_models, find_rows, what_became_of


@dataclass(frozen=True, slots=True)
class OfflinePlan:
    """Made by `make_offline_plan`. `cluster` says whose resources `available` are."""

    config: OfflineConfig
    model: ModelFacts
    data: PreferenceData
    tasks: Sequence[Measured]
    steps: int
    placement: PlacementPlan
    memory: MemoryPlan
    available: Mapping[str, float]
    cluster: str


def make_offline_plan(config: OfflineConfig) -> OfflinePlan:
    """Check what a run would check before its start, and read its rows. Raises RaylignError, naming the cure."""
    models = find_models(config)
    model = model_facts(Path(models.folder), config.model)
    data = find_rows(config, models)
    tasks = find_tasks(config, models.tokenizer)
    where, available = present_resources(config.placement)
    steps = total_steps(len(data.train), config.schedule, config.trainer)
    placement = plan_trainer_team(config, available)
    memory = memory_plan(
        config, Subject(model.folder, model.trained, data.train), placement, gpu_bytes(config.placement)
    )
    memory.require_fit()
    return OfflinePlan(config, model, data, tasks, steps, placement, memory, available, where)


def show_offline_plan(config: OfflineConfig, console: Console) -> None:
    """Show what the recipe would run. Raises RaylignError, naming the cure, when it could not."""
    print_offline_plan(make_offline_plan(config), console)


def print_offline_plan(plan: OfflinePlan, console: Console) -> None:
    """`name value` lines, the table of memory, then notes."""
    console.print(grid([*_inputs(plan), *_work(plan), *_outside(plan)]), "", memory_table(plan.memory), sep="\n")
    notes = [
        *memory_notes(plan.memory),
        left_out(plan.data.invalid),
        mixed_scales(plan.data, plan.config.score_options),
    ]
    if run_directory(plan.config).exists():
        notes.append(f"{run_directory(plan.config)} exists already: `raylign run` goes on with it")
    for note in filter(None, notes):
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


def _inputs(plan: OfflinePlan) -> list[Line]:
    config, model, data = plan.config, plan.model, plan.data
    kind = "every weight" if config.model.lora is None else f"LoRA adapter of rank {config.model.lora.r}"
    return [
        ("recipe", config.recipe),
        ("model", f"{config.model.path}, in {model.folder}"),
        ("", f"{model.parameters:,} parameters in {config.model.dtype}, up to {model.context:,} tokens"),
        ("trained", f"{kind}: {model.trained:,} parameters ({model.trained / model.parameters:.1%})"),
        *loss_lines(config.objective),
        ("data", f"{data.source}: {len(data.train):,} rows to train on, {len(data.held_out):,} held out"),
        ("", what_became_of(data)),
    ]


def _work(plan: OfflinePlan) -> list[Line]:
    trainer, schedule = plan.config.trainer, plan.config.schedule
    return [
        (
            many(plan.config.rounds, "round"),
            f"{many(schedule.num_train_epochs, 'epoch')} in {many(schedule.rounds_per_epoch, 'part')}, "
            f"{many(plan.steps, 'optimizer step')} of {many(trainer.train_batch_size, 'row')} "
            f"({many(trainer.ranks, 'rank')} x {trainer.per_device_train_batch_size} per device x "
            f"{trainer.gradient_accumulation_steps} accumulated)",
        ),
        ("", f"{plan.config.rounds + 1} evaluations of {many(len(plan.data.held_out), 'row')}"),
        *capability_lines(plan.tasks, plan.config.capability),
        *guard_lines(plan.config),
    ]


def _outside(plan: OfflinePlan) -> list[Line]:
    run = run_directory(plan.config)
    needs = needed(plan.placement.required(), plan.available)
    tracking = plan.config.tracking
    return [
        ("required", f"{needs} on {plan.cluster}, {plan.placement.device}"),
        ("run directory", str(run)),
        ("MLflow", f"{default_uri(tracking, run)}, experiment {tracking.experiment}"),
    ]
