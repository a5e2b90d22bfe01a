"""Multiple-choice tasks of lm-eval, where it is installed: its items, prompts and metrics, over our log-probs."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from raylign.config.capability import LM_EVAL, task_name
from raylign.errors import ConfigError, DataError
from raylign.evaluation.capability.likelihood import Encoder, Logps, ask
from raylign.evaluation.capability.measures import ItemResult
from raylign.records import Completions

_KIND = "multiple_choice"
Pair = tuple[str, str]
"""A context and its continuation."""


@dataclass(frozen=True, slots=True)
class LmEvalTask:
    """`loaded` is lm-eval's own dict of tasks; `pairs` are what it asks. Made by `lm_eval_task`."""

    name: str
    loaded: Any
    pairs: tuple[Pair, ...]
    encoder: Encoder

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.pairs).encode()).hexdigest()

    @property
    def items(self) -> int:
        return sum(len(task.eval_docs) for task in self.loaded["tasks"].values())

    @property
    def rows(self) -> int:
        return len(grouped(self.pairs, self.encoder))

    def measure(self, logps: Logps, advance: Callable[[int], None]) -> tuple[ItemResult, ...]:
        """See `Measured`. Metrics are those of lm-eval, by item; of several filters the first one's."""
        from lm_eval import evaluate  # noqa: PLC0415 - an optional package

        def answer(pairs: Sequence[Pair]) -> list[float]:
            found = ask(f"task {self.name}", grouped(pairs, self.encoder), logps, advance)
            return [logp for of_row in found for logp in of_row]

        results: Any = evaluate(_model(answer), self.loaded, bootstrap_iters=0, log_samples=True)
        items: dict[str, ItemResult] = {}
        for leaf, samples in sorted(results["samples"].items()):
            for sample in samples:
                numbers = {name: float(sample[name]) for name in sample["metrics"] if _is_number(sample[name])}
                own = f"{leaf}/{sample['doc_id']}"
                items.setdefault(own, ItemResult(own, (), (), 0, None, numbers))
        return tuple(items.values())


def lm_eval_task(task: str, encoder: Encoder) -> LmEvalTask:
    """The task `lm_eval:NAME`, or `lm_eval:FILE.yaml` of a user's own, with its data.

    Raises ConfigError when lm-eval is not installed, has no such task, or the task is not multiple choice, DataError
    when a question is longer than the window.
    """
    name = task.removeprefix(LM_EVAL)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"evaluation.capability.tasks has {task}, and lm-eval is not installed; pip install lm-eval")
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 - an optional package

    try:
        loaded = TaskManager(include_defaults=not name.endswith(".yaml")).load([name])
    except KeyError as error:
        raise ConfigError(
            f"evaluation.capability.tasks: lm-eval has no task {name!r} ({error}); lm-eval ls tasks has them all"
        ) from error
    pairs: list[Pair] = []
    for own, one in loaded["tasks"].items():
        if one.OUTPUT_TYPE != _KIND:
            raise ConfigError(
                f"evaluation.capability.tasks: lm-eval's {own} is of kind {one.OUTPUT_TYPE}, and only {_KIND} is "
                "answered by log-likelihood alone; leave it out"
            )
        one.build_all_requests(rank=0, world_size=1)
        pairs += [request.args for request in one.instances]
    found = LmEvalTask(task_name(task), loaded, tuple(pairs), encoder)
    for row in grouped(pairs, encoder):
        if (length := len(row.prompt) + max(map(len, row.completions))) > encoder.window:
            raise DataError(
                f"task {found.name}: a question has {length} tokens, more than {encoder.option}={encoder.window}; "
                f"raise {encoder.option}"
            )
    return found


def grouped(pairs: Iterable[Pair], encoder: Encoder) -> list[Completions]:
    """In their order, those that follow one another with the same context as one row."""
    encoded = ((tuple(context), tuple(own)) for context, own in (encoder.pair(*pair) for pair in pairs))
    return [
        Completions(context, tuple(own for _, own in of_context))
        for context, of_context in groupby(encoded, key=lambda pair: pair[0])
    ]


def _model(answer: Callable[[Sequence[Pair]], list[float]]) -> Any:
    """lm-eval's model, which is asked for log-likelihoods alone. Whether an answer is the greedy one is not known."""
    from lm_eval.api.model import LM  # noqa: PLC0415 - an optional package

    class Asked(LM):  # type: ignore[misc] # without type information
        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return [(logp, False) for logp in answer([request.args for request in requests])]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError("no multiple-choice task asks for it")

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError("no multiple-choice task asks for it")

    return Asked()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
