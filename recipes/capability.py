"""What a policy still knows beside what it is trained for, as a stage of a recipe."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from raylign.config import OfflineConfig, OnlineDpoConfig, RunConfig
from raylign.config.capability import LM_EVAL
from raylign.evaluation.capability.likelihood import Encoder, Measured, encode
from raylign.evaluation.capability.lm_eval_tasks import lm_eval_task
from raylign.evaluation.capability.measures import summary
from raylign.evaluation.capability.tasks import load_task
from raylign.records import AnyEvaluation, RoundReport
from raylign.roles import Trainers
from raylign.run.inputs import Input
from raylign.run.rounds import RoundLog
from recipes.run import Run


def find_tasks(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Measured, ...]:
    """The tasks of `evaluation.capability` in tokens. Raises RaylignError when one cannot be asked, with the cure."""
    if config.capability is None:
        return ()
    option, longest = config.longest
    encoder = Encoder(tokenizer, longest, option)
    return tuple(
        lm_eval_task(task, encoder) if task.startswith(LM_EVAL) else encode(load_task(task), encoder)
        for task in config.capability.tasks
    )


def task_inputs(tasks: Sequence[Measured]) -> dict[str, Input]:
    """The tasks by their contents: before and after are asked the same."""
    return {
        f"evaluation.capability.tasks={task.name}": Input(task.digest, "its texts or questions", fixed=True)
        for task in tasks
    }


def with_capability(
    run: Run,
    log: RoundLog,
    evaluation: AnyEvaluation,
    trainers: Trainers,
    config: OnlineDpoConfig | OfflineConfig,
    *,
    last: bool = False,
) -> AnyEvaluation:
    """`evaluation` with what the policy still knows, in rounds that measure it: before round 1 and after the `last`.

    A stage of its own, after all that says whether the run goes on: who ends early has it of the last version too. Once
    the policy has trained on it cannot be had any more.
    """
    block = config.capability
    if block is None or not run.tasks or not block.is_due(log.index, last=last):
        return evaluation
    if log.trained.passed and not log.is_finished("capability"):
        return evaluation
    with log.stage("capability", sum(task.rows for task in run.tasks), "rows") as stage:
        if stage.done:
            results = log.read_capability()
        else:
            results = {task.name: task.measure(trainers.policy_logps, stage.advance) for task in run.tasks}
            log.save_capability(stage, results)
    found = summary(results, log.capability_before_training(), config.evaluation, config.run.seed)
    return replace(evaluation, capability=found)


def report_with_capability(
    run: Run, log: RoundLog, report: RoundReport, trainers: Trainers, config: OnlineDpoConfig | OfflineConfig
) -> RoundReport:
    """The same for the report of a round."""
    last = run.ends_with(report)
    evaluation = with_capability(run, log, report.evaluation, trainers, config, last=last)
    return replace(report, evaluation=evaluation, seconds=log.seconds)
