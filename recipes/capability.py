"""What a policy still knows beside what it is trained for, as a stage of a recipe."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from raylign.config import OfflineConfig, OnlineDpoConfig, RunConfig
from raylign.config.capability import LM_EVAL
from raylign.evaluation.capability.likelihood import Encoder, Measured, encode
from raylign.evaluation.capability.lm_eval_tasks import lm_eval_task
from raylign.evaluation.capability.measures import summary
from raylign.evaluation.capability.tasks import load_task
from raylign.roles import Trainers
from raylign.run.inputs import Input
from raylign.run.rounds import RoundLog


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


def measure_capability(
    log: RoundLog, tasks: Sequence[Measured], trainers: Trainers, config: OnlineDpoConfig | OfflineConfig
) -> Mapping[str, float]:
    """`raylign.evaluation.capability.measures.summary` of the policy as it is; empty in rounds that measure none.

    Belongs before the stage `evaluate`: once that is finished, the policy may be another one.
    """
    block = config.capability
    if block is None or not tasks or not block.is_due(log.index, config.rounds):
        return {}
    if log.is_finished("evaluate") and not log.is_finished("capability"):
        return {}
    with log.stage("capability", sum(task.rows for task in tasks), "rows") as stage:
        if stage.done:
            results = log.read_capability()
        else:
            results = {task.name: task.measure(trainers.policy_logps, stage.advance) for task in tasks}
            log.save_capability(stage, results)
    return summary(results, log.capability_before_training(), config.evaluation, config.run.seed)
