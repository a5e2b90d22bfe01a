"""A policy against its opponents on a prompt file, by any scorer: win rates, and nothing is trained.

Run it with `raylign run recipes/evaluate_smollm2.yaml`. Every side answers, then all answers are scored, or a judge
compares them two at a time. Each stage leaves a file; run again, it goes on at the first that is not finished.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from rich.text import Text

from raylign.config import EvaluateConfig, load_config
from raylign.errors import ConfigError
from raylign.evaluation.comparison import Comparison, compare
from raylign.evaluation.held_out import evaluate
from raylign.evaluation.win_rate import Pair, judged_pairs, rates_over, scored_pairs, to_compare
from raylign.export.card import Method
from raylign.records import Candidate, Prompt, Score
from raylign.report.tables import report_console
from raylign.report.win_rates import win_rate_table
from raylign.roles import Generators, Scorer
from raylign.run.directory import REPORT_NAME, require_continuable, run_path
from raylign.run.files import finished_record
from raylign.run.rounds import RoundLog, numbered
from raylign.sampling.decoding import Decoding
from raylign.scoring.base import check_unscored
from raylign.scoring.load import public_scorer
from recipes.commands.failures import as_script
from recipes.commands.plan_evaluate import show_evaluation_plan
from recipes.opening import evaluation_run
from recipes.recipe import Recipe
from recipes.run import Run
from recipes.sides import Found, in_turn

Serve = Callable[[Found], Generators]
"""Generators that serve a side, until another one is served or the scorer starts."""
Scoring = Callable[[], AbstractContextManager[Scorer]]
"""The scorer, for as long as the context lasts."""
REPORT = TypeAdapter(Comparison)


def answer(log: RoundLog, number: int, side: Found, serve: Serve, config: EvaluateConfig) -> list[Candidate]:
    """What side `number` (0 is the policy) answers to every prompt: given, or sampled."""
    prompts, block = side.prompts.held_out, config.evaluation
    decoding = Decoding(block.num_generations, block.max_new_tokens, block.temperature, top_p=1.0, top_k=0)
    if side.given is not None:
        return list(side.given)
    with (
        log.stage(f"sample{numbered(number)}", len(prompts), "prompts") as stage,
        log.sampled(stage, prompts, (side.version,) * block.num_generations, number) as answers,
    ):
        if answers.missing:
            serve(side).sample(
                answers.missing,
                decoding,
                seed=config.run.seed,
                round_index=0,
                version=side.version,
                advance=stage.advance,
                on_finished=answers.add,
            )
    return answers.candidates


def score(
    log: RoundLog,
    number: int,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    scorer: Scorer,
    config: EvaluateConfig,
) -> list[Score]:
    """What the scorer says of each answer of side `number`, or of those that are shown to it two at a time."""
    with log.stage(f"score{numbered(number)}", len(candidates), "answers") as stage:
        if stage.done:
            return log.read_scores(candidates, number)
        scores = scorer.score(prompts, candidates, stage.advance)
        log.save_candidates(stage, prompts, candidates, scores, number)
        log.save_scoring(stage, scorer.metrics(), number)
        check_unscored(scores, config.scoring.max_unscored)
    return scores


def pairs_with(
    log: RoundLog,
    number: int,
    prompts: Sequence[Prompt],
    own: tuple[Sequence[Candidate], Sequence[Score]],
    other: Sequence[Candidate],
    scorer: Scorer,
    config: EvaluateConfig,
) -> list[Pair]:
    """The policy's answers against those of opponent `number`: a judge sees both, any other scorer each alone."""
    if config.scoring.compares:
        asked, shown = to_compare(prompts, own[0], other)
        return judged_pairs(shown, score(log, number, asked, shown, scorer, config))
    return scored_pairs(*own, other, score(log, number, prompts, other, scorer, config))


def compared(run: Run, sides: Sequence[Found], serve: Serve, scoring: Scoring, config: EvaluateConfig) -> Comparison:
    """Every side answers, the scorer compares, and what comes out is on record."""
    log, block = run.round_log(0), config.evaluation
    answers = {number: answer(log, number, sides[number], serve, config) for number in in_turn(sides)}
    prompts, (policy, *opponents) = sides[0].prompts.held_out, sides
    with scoring() as scorer:
        scores = score(log, 0, prompts, answers[0], scorer, config)
        pairs = {
            side.name: pairs_with(log, number, prompts, (answers[0], scores), answers[number], scorer, config)
            for number, side in enumerate(opponents, 1)
        }
    told = {side.name: side.told for side in opponents}
    found = compare(pairs, told, prompts, block.category, block.confidence)
    rates = {name: rates_over(opponent.overall) for name, opponent in found.items()}
    first, *_ = rates.values()
    evaluation = evaluate(prompts, answers[0], scores, [], block, config.run.seed, win_rates=first)
    of_all = {
        f"{rate}/{name}": value
        for name, own in rates.items()
        for rate, value in own.items()
        if isinstance(value, float)
    }
    evaluation = replace(evaluation, win_rates=of_all)
    run.finish_baseline(evaluation)
    return Comparison(policy.told, public_scorer(config.scoring), len(prompts), block.confidence, evaluation, found)


def main(config: EvaluateConfig) -> Path:
    """Run the recipe, or go on with it where an earlier call was stopped; returns the run directory."""
    require_continuable(config)
    path = run_path(config.run)
    if done := finished_record(path / REPORT_NAME, REPORT):
        show(done, report_console())
        return path
    with evaluation_run(config, __file__) as opened:
        comparison = compared(opened.run, opened.sides, opened.serve, opened.scoring, config)
        opened.run.keep_report(json.dumps(asdict(comparison), indent=1))
        show(comparison, report_console())
        opened.run.say(f"results: {path}")
    return path


def show(comparison: Comparison, console: Console) -> None:
    """Who was compared, and the table."""
    score = comparison.evaluation
    console.print(Text(f"policy: {comparison.policy}, by {comparison.scorer}"), soft_wrap=True)
    mean = f"{score.score:.3f} [{score.score_low:.3f}, {score.score_high:.3f}]"
    console.print(Text(f"mean score {mean} on {comparison.prompts} prompts"), soft_wrap=True)
    for name, opponent in comparison.opponents.items():
        console.print(Text(f"{name}: {opponent.against}"), soft_wrap=True)
    console.print(win_rate_table(comparison))


def method(config: EvaluateConfig) -> Method:
    """Nothing comes out of it that has a model card."""
    raise ConfigError("the recipe evaluate trains no model; export the run that it has evaluated")


RECIPE = Recipe(EvaluateConfig, main, show_evaluation_plan, method)

if __name__ == "__main__":
    with as_script():
        main(load_config(Path(sys.argv[1]), sys.argv[2:], kind=EvaluateConfig))
