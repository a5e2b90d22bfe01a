"""Offline DPO (Rafailov et al. 2023): any preference loss on a data set, the whole loop on one screen.

Run it with `raylign run recipes/offline_dpo_smollm2.yaml data.source=FILE`, or copy this file and edit the round.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from raylign.config import OfflineConfig, OfflineDpoConfig, load_config
from raylign.data.preferences import PreferenceData
from raylign.data.split import rows_of_round
from raylign.evaluation.guard import Decision, guarded
from raylign.evaluation.health import round_health
from raylign.evaluation.held_out import Metric, held_out_evaluation
from raylign.export.card import Method, loss_name, public_name
from raylign.records import AnyEvaluation, Preference, RoundReport
from raylign.reference.versions import pace
from raylign.roles import Trainers
from raylign.run.rounds import RoundLog
from recipes.capability import report_with_capability, with_capability
from recipes.commands.failures import as_script
from recipes.commands.plan_offline import show_offline_plan
from recipes.opening import offline_run
from recipes.recipe import Recipe
from recipes.run import Run, finished_before, train_steps

METRIC: Metric = "rewards/accuracies"
"""The share of held-out pairs ranked rightly sums an evaluation up."""


def evaluate_rows(
    log: RoundLog, rows: Sequence[Preference], metric: Metric, trainers: Trainers, config: OfflineConfig
) -> AnyEvaluation:
    """Loss and metrics on held-out rows, against the reference the round trained with; an earlier attempt's are read.

    `metric` sums them up. Of a reference that never moves the rows have the log-probs already. The loss is that of
    `config`, whatever the guard has raised since, so that versions compare.
    """
    with log.stage("evaluate", len(rows), "rows") as stage:
        if stage.done:
            return log.read_evaluation()
        if pace(config.measured_against) is not None:
            rows = trainers.with_reference(rows, config.run.seed, max(0, log.index - 1))
        trainers.take_loss(config.objective)
        evaluation = held_out_evaluation(trainers.evaluate(rows), metric, config.evaluation, config.run.seed)
        log.save_evaluation(stage, evaluation)
    return evaluation


def run_round(
    log: RoundLog,
    rows: Sequence[Preference],
    held_out: Sequence[Preference],
    known: dict[str, Preference],
    trainers: Trainers,
    config: OfflineDpoConfig,
    made: Sequence[Decision] = (),
) -> RoundReport:
    """Round `index` trains policy version `index` on its rows of the epoch; the guard `made` these decisions before."""
    preferences, guided = reference(log, rows, known, trainers, config), guarded(config, config.loss, made)
    steps = train_steps(log, preferences, trainers, guided)
    evaluation = evaluate_rows(log, held_out, METRIC, trainers, config)
    counts, health = {"preferences": len(preferences)}, round_health(steps, guided.loss)
    return RoundReport(log.index, log.index, counts, tuple(steps), {}, evaluation, log.seconds, {}, health)


def reference(
    log: RoundLog,
    rows: Sequence[Preference],
    known: dict[str, Preference],
    trainers: Trainers,
    config: OfflineDpoConfig,
) -> tuple[Preference, ...]:
    """Reference log-probs of the round's rows; of a reference that never moves they stay `known` in later epochs."""
    with log.stage("reference", len(rows), "preferences") as stage:
        if stage.done:
            return log.read_preferences([row.prompt for row in rows], [c for row in rows for c in row.candidates])
        if new := [row for row in rows if row.prompt.id not in known]:
            measured = trainers.with_reference(new, config.run.seed + log.index, log.index - 1)
            known.update((row.prompt.id, row) for row in measured)
        preferences = tuple(known[row.prompt.id] for row in rows)
        log.save_preferences(stage, preferences)
    return preferences


def train(run: Run, data: PreferenceData, trainers: Trainers, config: OfflineDpoConfig) -> None:
    """Evaluate, then train and evaluate for every round that is not finished."""
    moves = pace(config.reference) is not None
    # Of a reference that never moves once for all evaluations and epochs.
    held_out = data.held_out if moves else trainers.with_reference(data.held_out, config.run.seed, 0)
    known: dict[str, Preference] = {}
    log = run.round_log(0)
    baseline = evaluate_rows(log, held_out, METRIC, trainers, config)
    run.finish_baseline(with_capability(run, log, baseline, trainers, config))
    for index in run.rounds_to_do():
        rows = rows_of_round(data.train, index, config.schedule.rounds_per_epoch, config.run.seed)
        log, found = run.round_log(index), {} if moves else known
        report = run_round(log, rows, held_out, found, trainers, config, run.directory.decisions_before(index))
        run.finish_round(report_with_capability(run, log, report, trainers, config))


def main(config: OfflineDpoConfig) -> Path:
    """Run the recipe, or go on with it where an earlier call was stopped; returns the run directory."""
    if done := finished_before(config):
        return done.path
    with offline_run(config, __file__) as (run, data, trainers):
        train(run, data, trainers, config)
    return run.directory.path


def method(config: OfflineDpoConfig) -> Method:
    """How a model card tells of it."""
    told = "direct\npreference optimisation on a data set of preferences"
    facts = {"Preferences": public_name(config.data.source)}
    return Method(told, f"offline DPO, loss {loss_name(config.loss)}", ("dpo",), facts)


RECIPE = Recipe(OfflineDpoConfig, main, show_offline_plan, method)

if __name__ == "__main__":
    with as_script():
        main(load_config(Path(sys.argv[1]), sys.argv[2:], kind=OfflineDpoConfig))
