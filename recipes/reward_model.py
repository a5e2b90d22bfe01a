"""A reward model from preferences (Bradley-Terry, probit or Plackett-Luce); the whole loop on one screen.

Run it with `raylign run recipes/reward_model_smollm2.yaml data.source=FILE`, or copy this file and edit the round.
`raylign export` then writes a folder that the scorer `reward_model` and transformers read.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from raylign.config import RewardModelConfig, load_config
from raylign.data.preferences import PreferenceData
from raylign.data.split import rows_of_round
from raylign.evaluation.calibration import calibration, random_pairs
from raylign.evaluation.held_out import held_out_evaluation
from raylign.export.card import Method, loss_name, public_name
from raylign.records import AnyEvaluation, Preference, RoundReport
from raylign.roles import Trainers
from raylign.run.rounds import RoundLog
from recipes.commands.failures import as_script
from recipes.commands.plan_offline import show_offline_plan
from recipes.opening import offline_run
from recipes.recipe import Recipe
from recipes.run import Run, finished_before, train_steps


def run_round(
    log: RoundLog,
    rows: Sequence[Preference],
    held_out: Sequence[Preference],
    trainers: Trainers,
    config: RewardModelConfig,
) -> RoundReport:
    """Round `index` trains version `index` of the model on its rows of the epoch."""
    steps = train_steps(log, rows, trainers, config)
    evaluation = evaluate_model(log, held_out, trainers, config)
    return RoundReport(log.index, log.index, {"preferences": len(rows)}, tuple(steps), {}, evaluation, log.seconds)


def evaluate_model(
    log: RoundLog, held_out: Sequence[Preference], trainers: Trainers, config: RewardModelConfig
) -> AnyEvaluation:
    """The share of held-out pairs ranked rightly, and whether the predicted probabilities come true."""
    with log.stage("evaluate", len(held_out), "rows") as stage:
        if stage.done:
            return log.read_evaluation()
        measured = trainers.evaluate(held_out)
        lists = any(len(row.candidates) > 2 for row in held_out)
        compared = trainers.evaluate(random_pairs(held_out, config.run.seed)) if lists else measured
        reliability = calibration(compared.chosen, compared.rejected, config.evaluation.bins, config.loss.link)
        log.save_reliability(stage, reliability)
        evaluation = held_out_evaluation(
            measured, "rewards/accuracies", config.evaluation, config.run.seed, reliability.measures()
        )
        log.save_evaluation(stage, evaluation)
    return evaluation


def train(run: Run, data: PreferenceData, trainers: Trainers, config: RewardModelConfig) -> None:
    """Evaluate, then train and evaluate for every round that is not finished."""
    run.finish_baseline(evaluate_model(run.round_log(0), data.held_out, trainers, config))
    for index in run.rounds_to_do():
        rows = rows_of_round(data.train, index, config.schedule.rounds_per_epoch, config.run.seed)
        run.finish_round(run_round(run.round_log(index), rows, data.held_out, trainers, config))


def main(config: RewardModelConfig) -> Path:
    """Run the recipe, or go on with it where an earlier call was stopped; returns the run directory."""
    if done := finished_before(config):
        return done.path
    with offline_run(config, __file__) as (run, data, trainers):
        train(run, data, trainers, config)
    return run.directory.path


def method(config: RewardModelConfig) -> Method:
    """How a model card tells of it."""
    told = "reward\nmodelling of preferences"
    facts = {"Preferences": public_name(config.data.source)}
    return Method(told, f"reward model, loss {loss_name(config.loss)}", ("reward-model",), facts)


RECIPE = Recipe(RewardModelConfig, main, show_offline_plan, method)

if __name__ == "__main__":
    with as_script():
        main(load_config(Path(sys.argv[1]), sys.argv[2:], kind=RewardModelConfig))
