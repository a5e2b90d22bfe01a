"""What the policy is asked before and after training, beside what it is trained for."""

from pathlib import Path

from pydantic import PositiveInt, field_validator

from raylign.config.base import Block

EMBEDDED_TASKS = ("perplexity", "multiple_choice", "arithmetic")
LM_EVAL = "lm_eval:"
SUFFIXES = (".jsonl", ".json", ".parquet")


class CapabilityBlock(Block):
    """What the policy still knows, by log-likelihood: a forward pass over texts and questions, and nothing sampled."""

    tasks: tuple[str, ...] = EMBEDDED_TASKS
    """`perplexity` (texts), `multiple_choice` and `arithmetic` (questions) are raylign's own. A .jsonl, .json or
    .parquet file of yours has rows with `text`, or with `question`, `choices` and `answer` (the place of the right one,
    from 0). `lm_eval:NAME` is a multiple-choice task of lm-eval, `lm_eval:FILE.yaml` one of yours in its format, where
    it is installed (pip install lm-eval)."""
    every: PositiveInt | None = None
    """Measure after every so many rounds too; null measures before round 1 and after the last round, the one that
    ends the run early too."""

    def is_due(self, index: int, *, last: bool) -> bool:
        """Whether it is measured after round `index` (0: before round 1), the run's `last` or not."""
        return index == 0 or last or (self.every is not None and index % self.every == 0)

    @field_validator("tasks")
    @classmethod
    def tasks_are_known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if not tasks:
            raise ValueError("no task is named; name one, or leave the block out (evaluation.capability=null)")
        for task in tasks:
            is_known = task in EMBEDDED_TASKS or task.endswith(SUFFIXES)
            is_theirs = task.startswith(LM_EVAL) and task != LM_EVAL
            if not (is_known or is_theirs):
                raise ValueError(
                    f"{task!r} is no task; take {', '.join(EMBEDDED_TASKS)}, a {', '.join(SUFFIXES)} file, or "
                    f"{LM_EVAL}NAME"
                )
        names = [task_name(task) for task in tasks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two tasks would be called {twice!r} in metrics; leave one out, or rename its file")
        return tasks


def task_name(task: str) -> str:
    """What metrics call it: a file by its name without the ending."""
    name = task.removeprefix(LM_EVAL)
    return Path(name).stem if name.endswith((*SUFFIXES, ".yaml")) else name
