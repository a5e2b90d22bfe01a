"""Supervised fine-tuning: the loss of the answers alone, packed; the whole loop on one screen.

On preferences it trains on the chosen answers, which makes the reference for DPO that Rafailov et al. 2023 (section 4)
recommend. Run it with `raylign run recipes/sft_smollm2.yaml data.source=FILE`, or copy this file and edit the round.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from raylign.config import SftConfig, load_config
from raylign.data.preferences import PreferenceData
from raylign.data.split import rows_of_round
from raylign.export.card import Method, public_name
from raylign.records import Preference, RoundReport
from raylign.roles import Trainers
from raylign.run.rounds import RoundLog
from recipes.capability import report_with_capability, with_capability
from recipes.commands.failures import as_script
from recipes.commands.plan_offline import show_offline_plan
from recipes.offline_dpo import evaluate_rows
from recipes.opening import offline_run
from recipes.recipe import Recipe
from recipes.run import Run, finished_before, train_steps


def run_round(
    log: RoundLog,
    rows: Sequence[Preference],
    held_out: Sequence[Preference],
    trainers: Trainers,
    config: SftConfig,
) -> RoundReport:
    """Round `index` trains policy version `index` on its rows of the epoch."""
    steps = train_steps(log, rows, trainers, config)
    evaluation = evaluate_rows(log, held_out, "loss", trainers, config)
    return RoundReport(log.index, log.index, {"preferences": len(rows)}, tuple(steps), {}, evaluation, log.seconds)


def train(run: Run, data: PreferenceData, trainers: Trainers, config: SftConfig) -> None:
    """Evaluate, then train and evaluate for every round that is not finished."""
    log = run.round_log(0)
    baseline = evaluate_rows(log, data.held_out, "loss", trainers, config)
    run.finish_baseline(with_capability(run, log, baseline, trainers, config))
    for index in run.rounds_to_do():
        rows = rows_of_round(data.train, index, config.schedule.rounds_per_epoch, config.run.seed)
        log = run.round_log(index)
        report = run_round(log, rows, data.held_out, trainers, config)
        run.finish_round(report_with_capability(run, log, report, trainers, config))


def main(config: SftConfig) -> Path:
    """Run the recipe, or go on with it where an earlier call was stopped; returns the run directory."""
    if done := finished_before(config):
        return done.path
    with offline_run(config, __file__) as (run, data, trainers):
        train(run, data, trainers, config)
    return run.directory.path


def method(config: SftConfig) -> Method:
    """How a model card tells of it."""
    return Method(
        "supervised\nfine-tuning on answers",
        "SFT on the answers",
        ("sft",),
        {"Examples": public_name(config.data.source)},
    )


RECIPE = Recipe(SftConfig, main, show_offline_plan, method)

if __name__ == "__main__":
    with as_script():
        main(load_config(Path(sys.argv[1]), sys.argv[2:], kind=SftConfig))
