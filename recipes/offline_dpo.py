"""Offline DPO (Rafailov et al. 2023): any preference loss on a data set, the whole loop on one screen.

Run it with `raylign run recipes/offline_dpo_smollm2.yaml data.source=FILE`, or copy this file and edit the round.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from raylign.config import OfflineConfig, OfflineDpoConfig, load_config
from raylign.data.preferences import PreferenceData
from raylign.data.split import rows_of_round
from raylign.evaluation.capability.likelihood import Measured
from raylign.evaluation.held_out import Metric, held_out_evaluation
from raylign.export.card import Method, loss_name, public_name
from raylign.records import AnyEvaluation, Preference, RoundReport
from raylign.reference.versions import pace
from raylign.roles import Trainers
from raylign.run.rounds import RoundLog
from recipes.capability import measure_capability
from recipes.commands.failures import as_script
from recipes.commands.plan_offline import show_offline_plan
from recipes.opening import offline_run
from recipes.recipe import Recipe
from recipes.run import Run, finished_before, train_steps


def evaluate_rows(
    log: RoundLog,
    rows: Sequence[Preference],
    metric: Metric,
    trainers: Trainers,
    config: OfflineConfig,
    tasks: Sequence[Measured] = (),
) -> AnyEvaluation:
    """Loss and metrics on held-out rows, and capability on `tasks`; an earlier attempt's are read."""
    capability = measure_capability(log, tasks, trainers, config)
    with log.stage("evaluate", len(rows), "rows") as stage:
        if stage.done:
            return log.read_evaluation()
        evaluation = held_out_evaluation(trainers.evaluate(rows), metric, config.evaluation, config.run.seed)
        evaluation = replace(evaluation, capability=capability)
        log.save_evaluation(stage, evaluation)
    return evaluation


def run_round(
    log: RoundLog,
    rows: Sequence[Preference],
    held_out: Sequence[Preference],
    known: dict[str, Preference],
    trainers: Trainers,
    config: OfflineDpoConfig,
    tasks: Sequence[Measured] = (),
) -> RoundReport:
    """Round `index` trains policy version `index` on its rows of the epoch."""
    preferences = reference(log, rows, known, trainers, config)
    steps = train_steps(log, preferences, trainers, config)
    evaluation = evaluate_policy(log, held_out, trainers, config, tasks)
    counts = {"preferences": len(preferences)}
    return RoundReport(log.index, log.index, counts, tuple(steps), {}, evaluation, log.seconds)


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


def evaluate_policy(
    log: RoundLog,
    held_out: Sequence[Preference],
    trainers: Trainers,
    config: OfflineDpoConfig,
    tasks: Sequence[Measured] = (),
) -> AnyEvaluation:
    """Loss, rewards and the share of held-out pairs ranked rightly, against the reference the round trained with.

    `tasks` are what its capability is measured on.
    """
    capability = measure_capability(log, tasks, trainers, config)
    with log.stage("evaluate", len(held_out), "rows") as stage:
        if stage.done:
            return log.read_evaluation()
        moves = pace(config.reference) is not None
        rows = trainers.with_reference(held_out, config.run.seed, max(0, log.index - 1)) if moves else held_out
        measured = trainers.evaluate(rows)
        evaluation = held_out_evaluation(measured, "rewards/accuracies", config.evaluation, config.run.seed)
        evaluation = replace(evaluation, capability=capability)
        log.save_evaluation(stage, evaluation)
    return evaluation


def train(run: Run, data: PreferenceData, trainers: Trainers, config: OfflineDpoConfig) -> None:
    """Evaluate, then train and evaluate for every round that is not finished."""
    moves = pace(config.reference) is not None
    # Of a reference that never moves once for all evaluations and epochs.
    held_out = data.held_out if moves else trainers.with_reference(data.held_out, config.run.seed, 0)
    known: dict[str, Preference] = {}
    run.finish_baseline(evaluate_policy(run.round_log(0), held_out, trainers, config, run.tasks))
    for index in run.rounds_to_do():
        rows = rows_of_round(data.train, index, config.schedule.rounds_per_epoch, config.run.seed)
        log, found = run.round_log(index), {} if moves else known
        run.finish_round(run_round(log, rows, held_out, found, trainers, config, run.tasks))


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
