"""The stages that all recipes on a data set share."""

from collections.abc import Mapping, Sequence

from raylign.config import OfflineConfig
from raylign.evaluation.held_out import Metric, held_out_evaluation
from raylign.records import AnyEvaluation, Preference
from raylign.roles import Trainers
from raylign.run.rounds import RoundLog
from raylign.training.schedule import steps_per_round


def train_rows(
    log: RoundLog, rows: Sequence[Preference], trainers: Trainers, config: OfflineConfig
) -> list[Mapping[str, float]]:
    """Every optimizer step of the round, then its checkpoint."""
    with log.stage("train", steps_per_round(len(rows), config.trainer), "steps") as stage:
        if stage.done:
            return list(log.trained.steps)
        return trainers.train_round(rows, config.run.seed + log.index, log, stage.advance)


def evaluate_rows(
    log: RoundLog, rows: Sequence[Preference], metric: Metric, trainers: Trainers, config: OfflineConfig
) -> AnyEvaluation:
    """Loss and metrics on held-out rows; an earlier attempt's are read."""
    with log.stage("evaluate", len(rows), "rows") as stage:
        if stage.done:
            return log.read_evaluation()
        evaluation = held_out_evaluation(trainers.evaluate(rows), metric, config.evaluation, config.run.seed)
        log.save_evaluation(stage, evaluation)
    return evaluation
