"""A plan as people read it."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raylign.config.blocks import SamplingBlock
from raylign.config.scoring import JudgeScoringBlock, leaves
from raylign.report.text import escape_control
from raylign.tracking.uri import default_uri
from recipes.commands.checks.machine import megabytes
from recipes.commands.plan import RunPlan, notes, run_directory
from recipes.commands.plan_reference import stored_bytes

Line = tuple[str, str]


def show_plan(plan: RunPlan, console: Console) -> None:
    """Sections of `name value` lines, the table of roles, then notes."""
    lines = [*_inputs(plan), *_work(plan)]
    console.print(grid(lines), "", _roles(plan), "", grid(_outside(plan)), sep="\n")
    for note in notes(plan):
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
        rated = len(judges) * plan.prompts.held_out
        facts.append(f"at most {asked:,} questions a round, {rated:,} an evaluation, without retries")
    return [("scorer", name), *(("", fact) for fact in facts)]


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
    required = plan.placement.required()
    needs = ", ".join(f"{required[name]:g} {name} of {plan.available.get(name, 0.0):g}" for name in required)
    push = f": {megabytes(plan.push_bytes)} each push" if plan.push_bytes else ""
    room = f", {megabytes(plan.free_bytes)} free" if push and plan.free_bytes else ""
    return [
        ("required", f"{needs} on {plan.cluster}, placement {config.placement.mode}"),
        ("weight sync", f"{plan.transport}{push}{room}"),
        ("run directory", str(run)),
        ("MLflow", f"{default_uri(config.tracking, run)}, experiment {config.tracking.experiment}"),
    ]


def grid(lines: Iterable[Line]) -> Table:
    """`name value` lines, the names in bold."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=13)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(Text(name, style="bold"), Text(escape_control(value)))
    return table


def _each(amounts: Iterable[float]) -> str:
    """One number, or the range when ranks share bundles unevenly."""
    found = sorted(set(amounts))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"


def many(count: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
