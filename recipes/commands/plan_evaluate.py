"""What an evaluation would run, found out without starting an actor or loading weights."""

from rich.console import Console
from rich.text import Text

from actors.placement import plan_evaluation
from raylign.config import EvaluateConfig
from raylign.config.scoring import JudgeScoringBlock, leaves
from raylign.prompts import left_out
from raylign.scoring.load import describe_scorer
from raylign.scoring.verifier import require_references
from raylign.tracking.uri import default_uri
from recipes.commands.plan import Line, grid, many, needed, present_resources, run_directory
from recipes.memory import evaluation_memory, gpu_bytes, memory_notes, memory_table
from recipes.sides import Found, find_sides


def show_evaluation_plan(config: EvaluateConfig, console: Console) -> None:
    """Show what the recipe would run. Raises RaylignError, naming the cure, when it could not."""
    scorer = describe_scorer(config.scoring, load=False)
    sides = find_sides(config, quarantine=False)
    require_references(sides[0].prompts.held_out, config.scoring)
    where, available = present_resources(config.placement)
    answering, scoring = plan_evaluation(config, available, samples=any(side.given is None for side in sides))
    memory = evaluation_memory(config, sides, answering, scoring, gpu_bytes(config.placement))
    memory.require_fit()
    run = run_directory(config)
    lines = [
        *(line for side in sides for line in _side(side, config)),
        *_work(sides, config),
        ("scorer", scorer[0]),
        *(("", fact) for fact in scorer[1:]),
        ("required", f"{needed(answering.required(), available)} to answer on {where}, {answering.device}"),
        ("", f"{needed(scoring.required(), available)} to score, when the generators are gone"),
        ("run directory", str(run)),
        ("MLflow", f"{default_uri(config.tracking, run)}, experiment {config.tracking.experiment}"),
    ]
    console.print(grid(lines), *(["", memory_table(memory)] if memory.phases else []), sep="\n")
    notes = [*memory_notes(memory), left_out(sides[0].prompts.invalid)]
    if run.exists():
        notes.append(f"{run} exists already: `raylign run` goes on with it")
    for note in filter(None, notes):
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


def _side(side: Found, config: EvaluateConfig) -> list[Line]:
    if side.given is not None:
        return [(side.name, f"{side.told}: {many(len(side.given), 'answer')}, nothing is sampled")]
    return [(side.name, f"{side.told}, model in {side.folder}")]


def _work(sides: list[Found], config: EvaluateConfig) -> list[Line]:
    block, prompts = config.evaluation, len(sides[0].prompts.held_out)
    sampled = sum(side.given is None for side in sides)
    tokens = sampled * prompts * block.num_generations * block.max_new_tokens
    lines = [
        ("prompts", f"{config.prompts.source}: {many(prompts, 'prompt')}"),
        ("answers", f"{many(sampled, 'side')} to sample, {block.num_generations} a prompt: at most {tokens:,} tokens"),
    ]
    if judges := sum(isinstance(leaf, JudgeScoringBlock) for leaf in leaves(config.scoring)):
        asked = judges * prompts * (1 + 2 * (len(sides) - 1))
        lines.append(("questions", f"at most {asked:,} to judges: both orders of each pair, and a rating"))
    return lines
