"""What an online recipe would run, and that as people read it."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors.placement import PlacementPlan, plan_team
from actors.weight_sync.folder import OneNode, shared_folder
from actors.weight_sync.transports import Name, weight_transport
from raylign.config import OnlineDpoConfig
from raylign.config.blocks import SamplingBlock
from raylign.config.reference import InitialReferenceBlock
from raylign.config.scoring import JudgeScoringBlock, ScoringBlock, asks_people, leaves
from raylign.evaluation.capability.likelihood import Measured
from raylign.prompts import PromptSet, left_out
from raylign.scoring.composition import of_gold
from raylign.scoring.load import describe_scorer
from raylign.tracking.uri import default_uri
from raylign.training.schedule import steps_per_round
from recipes.capability import find_tasks
from recipes.commands.checks.machine import megabytes
from recipes.commands.plan import (
    THIS_MACHINE,
    Line,
    ModelFacts,
    ReferenceFacts,
    capability_lines,
    grid,
    guard_lines,
    loss_lines,
    many,
    model_facts,
    needed,
    present_resources,
    reference_facts,
    run_directory,
    stored_bytes,
)
from recipes.memory import MemoryPlan, Subject, gpu_bytes, memory_notes, memory_plan, memory_table
from recipes.opening import find_models, find_prompts


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """Counts of the two parts, and the shortest, median and longest prompt of both, in tokens.

    `left_out` says which bad rows the run would go without; empty when it takes all.
    """

    train: int
    held_out: int
    shortest: int
    middle: float
    longest: int
    left_out: str


@dataclass(frozen=True, slots=True)
class Amounts:
    """Upper bounds of work: every completion as long as allowed, every prompt giving a preference."""

    sampled_per_round: int
    evaluated_per_round: int
    sampled: int
    evaluated: int
    steps_per_round: int
    steps: int


@dataclass(frozen=True, slots=True)
class RunPlan:
    """All that `raylign plan` shows. Made by `make_plan`.

    `scorer` is its name, then facts about it; `gold` the same of the gold scorer, empty without one.
    `push_bytes` is the size of one weight file in shared memory, 0 for transports without one; `free_bytes` is the
    room for it, 0 when that is on another machine.
    """

    config: OnlineDpoConfig
    model: ModelFacts
    reference: ReferenceFacts
    prompts: PromptFacts
    tasks: Sequence[Measured]
    scorer: tuple[str, ...]
    gold: tuple[str, ...]
    amounts: Amounts
    placement: PlacementPlan
    memory: MemoryPlan
    available: Mapping[str, float]
    cluster: str
    transport: Name
    push_bytes: int
    free_bytes: int


def show_plan(config: OnlineDpoConfig, console: Console) -> None:
    """Show what the recipe would run. Raises RaylignError, naming the cure, when it could not."""
    print_plan(make_plan(config), console)


def _describe_gold(block: ScoringBlock | None) -> tuple[str, ...]:
    if block is None:
        return ()
    with of_gold():
        return describe_scorer(block, load=False)


def make_plan(config: OnlineDpoConfig) -> RunPlan:
    """Check what a run would check before and right after its start. Raises RaylignError, naming the cure."""
    scorer = describe_scorer(config.scoring, load=False)
    gold = _describe_gold(config.evaluation.gold)
    models = find_models(config)
    model = model_facts(Path(models.folder), config.model)
    reference = reference_facts(config, model.folder, model.trained)
    prompts = find_prompts(config, models, quarantine=False)
    tasks = find_tasks(config, models.tokenizer)
    where, available = present_resources(config.placement)
    placement = plan_team(config, available)
    memory = memory_plan(
        config, Subject(model.folder, model.trained, prompts.train), placement, gpu_bytes(config.placement)
    )
    memory.require_fit()
    here = OneNode(shared_folder())
    transport = weight_transport(config, str(model.folder), placement, here)
    is_here = where == THIS_MACHINE
    if is_here:
        here.require_room(transport.needed_bytes)
    return RunPlan(
        config=config,
        model=model,
        reference=reference,
        prompts=prompt_facts(prompts),
        tasks=tasks,
        scorer=scorer,
        gold=gold,
        amounts=amounts(config, len(prompts.held_out)),
        placement=placement,
        memory=memory,
        available=available,
        cluster=where,
        transport=transport.engine.name,
        push_bytes=transport.needed_bytes,
        free_bytes=shutil.disk_usage(shared_folder()).free if is_here else 0,
    )


def prompt_facts(prompts: PromptSet) -> PromptFacts:
    lengths = [len(prompt.token_ids) for prompt in (*prompts.train, *prompts.held_out)]
    return PromptFacts(
        train=len(prompts.train),
        held_out=len(prompts.held_out),
        shortest=min(lengths),
        middle=median(lengths),
        longest=max(lengths),
        left_out=left_out(prompts.invalid),
    )


def amounts(config: OnlineDpoConfig, held_out: int) -> Amounts:
    """Evaluation runs before round 1 and after each of the `schedule.rounds` rounds."""
    schedule, sampling = config.schedule, config.sampling
    per_round = schedule.prompts_per_round * sampling.max_generations * sampling.max_new_tokens
    steps = steps_per_round(config.max_preferences_per_round, config.trainer)
    evaluated = held_out * config.evaluation.num_generations * sampling.max_new_tokens
    return Amounts(
        sampled_per_round=per_round,
        evaluated_per_round=evaluated,
        sampled=schedule.rounds * per_round,
        evaluated=(schedule.rounds + 1) * evaluated,
        steps_per_round=steps,
        steps=schedule.rounds * steps,
    )


def notes(plan: RunPlan) -> list[str]:
    """What is no error, but may not be meant."""
    config, found = plan.config, []
    run = run_directory(config)
    if plan.prompts.left_out:
        found.append(plan.prompts.left_out)
    if run.exists():
        found.append(f"{run} exists already: `raylign run` needs another run.name, or that folder gone")
    if config.trainer.train_batch_size > config.max_preferences_per_round:
        found.append(
            f"a step takes {config.trainer.train_batch_size} preferences, a round gives at most "
            f"{config.max_preferences_per_round}: every step will be smaller"
        )
    if config.model.lora is None and not isinstance(config.reference, InitialReferenceBlock):
        found.append(
            f"reference.policy={config.reference.policy} without an adapter keeps no copy of the initial policy: how "
            "far the policy has moved from it is not told"
        )
    passes = config.schedule.rounds * config.schedule.prompts_per_round / plan.prompts.train
    if passes > 1:
        found.append(f"the rounds use each of the {plan.prompts.train} training prompts {passes:.1f} times")
    return found


def print_plan(plan: RunPlan, console: Console) -> None:
    """Sections of `name value` lines, the table of roles, then notes."""
    lines = [*_inputs(plan), *_work(plan)]
    console.print(grid(lines), "", _roles(plan), "", memory_table(plan.memory), "", grid(_outside(plan)), sep="\n")
    for note in (*memory_notes(plan.memory), *notes(plan)):
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


def _inputs(plan: RunPlan) -> list[Line]:
    config, model, prompts = plan.config, plan.model, plan.prompts
    kind = "every weight" if config.model.lora is None else f"LoRA adapter of rank {config.model.lora.r}{_base(plan)}"
    held = f"; {megabytes(plan.reference.bytes_per_rank)} on every rank" if plan.reference.bytes_per_rank else ""
    share = model.trained / model.parameters
    return [
        ("model", f"{config.model.path}, in {model.folder}"),
        ("", f"{model.parameters:,} parameters in {config.model.dtype}, up to {model.context:,} tokens"),
        ("trained", f"{kind}: {model.trained:,} parameters ({share:.1%})"),
        *loss_lines(config.loss),
        ("reference", f"{config.reference.policy}: {plan.reference.what}{held}"),
        ("prompts", f"{config.prompts.source}: {prompts.train} to train on, {prompts.held_out} held out"),
        (
            "",
            f"{prompts.shortest} to {prompts.longest} tokens, median {prompts.middle:g}; "
            f"at most {config.max_prompt_tokens} (max_model_len less max_new_tokens)",
        ),
        *_scorer(plan),
    ]


def _scorer(plan: RunPlan) -> list[Line]:
    config, (name, *facts) = plan.config, plan.scorer
    if judges := [leaf for leaf in leaves(config.scoring) if isinstance(leaf, JudgeScoringBlock)]:
        asked = config.schedule.prompts_per_round * sum(_questions(judge, config.sampling) for judge in judges)
        rated = sum(isinstance(leaf, JudgeScoringBlock) for leaf in config.scorers) * plan.prompts.held_out
        facts.append(f"at most {asked:,} questions a round, {rated:,} an evaluation, without retries")
    if asks_people(config.scoring):
        most = config.schedule.prompts_per_round * comb(config.sampling.max_generations, 2)
        facts.append(f"at most {most:,} questions to people a round; the run ends as waiting until they have answered")
    gold = [("gold scorer" if number == 0 else "", fact) for number, fact in enumerate(plan.gold)]
    return [("scorer", name), *(("", fact) for fact in facts), *gold]


def _questions(judge: JudgeScoringBlock, block: SamplingBlock) -> int:
    """About one prompt at most. Verdicts that are not kept are asked for again with every attempt."""
    first = 1 if judge.cache is None else 1 + block.max_resamples
    counts = [block.num_generations * attempt for attempt in range(first, block.max_resamples + 2)]
    return sum(count * (count - 1) for count in counts)


def _base(plan: RunPlan) -> str:
    """What the adapter stands on, where that is not the checkpoint."""
    model = plan.config.model
    if not model.load_in_4bit:
        return ""
    nested = ", double quantisation" if model.use_bnb_nested_quant else ""
    size = megabytes(stored_bytes(plan.model.folder, model))
    return f" on a base in 4 bits ({model.bnb_4bit_quant_type}{nested}; {size} on every rank)"


def _candidates(block: SamplingBlock) -> str:
    """How many a prompt gets, of whom, and how often."""
    of_reference = f" ({block.reference_generations} of the reference)" if block.reference_generations else ""
    again = f", up to {block.max_resamples + 1} times until they give a pair," if block.max_resamples else ""
    return f"{block.num_generations} candidates{of_reference}{again}"


def _work(plan: RunPlan) -> list[Line]:
    config, amounts = plan.config, plan.amounts
    schedule, sampling, trainer = config.schedule, config.sampling, config.trainer
    return [
        (
            "each round",
            f"{schedule.prompts_per_round} prompts x {_candidates(sampling)} x at most "
            f"{sampling.max_new_tokens} tokens = at most {amounts.sampled_per_round:,} sampled tokens",
        ),
        (
            "",
            f"at most {many(amounts.steps_per_round, 'optimizer step')} of "
            f"{many(trainer.train_batch_size, 'preference')} ({many(trainer.ranks, 'rank')} x "
            f"{trainer.per_device_train_batch_size} per device x {trainer.gradient_accumulation_steps} accumulated), "
            f"{many(trainer.num_train_epochs, 'epoch')}",
        ),
        (
            "",
            f"evaluation: {plan.prompts.held_out} prompts x {many(config.evaluation.num_generations, 'completion')} "
            f"= at most {amounts.evaluated_per_round:,} tokens",
        ),
        *capability_lines(plan.tasks, config.capability),
        *guard_lines(config),
        (
            f"{many(schedule.rounds, 'round')}",
            f"at most {amounts.sampled:,} sampled tokens, {amounts.evaluated:,} more in "
            f"{schedule.rounds + 1} evaluations, {many(amounts.steps, 'optimizer step')}",
        ),
    ]


def _roles(plan: RunPlan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("role")
    for header in ("actors", "CPUs each", "GPUs each"):
        table.add_column(header, justify="right")
    table.add_column("device")
    placement = plan.placement
    for role, places, device in (
        ("generator", placement.generators, placement.device),
        ("trainer", placement.trainers, placement.device),
        ("scorer", (placement.scorer,), "gpu" if placement.scorer.num_gpus else "cpu"),
    ):
        table.add_row(
            role, str(len(places)), _each(p.num_cpus for p in places), _each(p.num_gpus for p in places), device
        )
    return table


def _outside(plan: RunPlan) -> list[Line]:
    config = plan.config
    run = run_directory(config)
    needs = needed(plan.placement.required(), plan.available)
    push = f": {megabytes(plan.push_bytes)} each push" if plan.push_bytes else ""
    room = f", {megabytes(plan.free_bytes)} free" if push and plan.free_bytes else ""
    return [
        ("required", f"{needs} on {plan.cluster}, placement {config.placement.mode}"),
        ("weight sync", f"{plan.transport}{push}{room}"),
        ("run directory", str(run)),
        ("MLflow", f"{default_uri(config.tracking, run)}, experiment {config.tracking.experiment}"),
    ]


def _each(amounts: Iterable[float]) -> str:
    """One number, or the range when ranks share bundles unevenly."""
    found = sorted(set(amounts))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"
