"""What is measured of a policy version, in the order in which people read it: tables, figures and MLflow follow it.

A new field of `Evaluation` gets a line of `MEASURES`, or of `BOOKKEEPING`; without one it is a curve and no more.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from raylign.records import AnyEvaluation, Evaluation, HeldOutEvaluation

Section = Literal["eval", "eval/drift", "eval/text"]


@dataclass(frozen=True, slots=True)
class Measure:
    """A value of an evaluation: its name there, how people read it, and the section of MLflow's charts that it is in.

    `low` and `high` name the bounds of its interval, if it has one. `falls`: lower is better. `detail`: a curve, and no
    column of tables.
    """

    name: str
    title: str
    form: str = "z.3f"
    section: Section = "eval"
    low: str = ""
    high: str = ""
    falls: bool = False
    detail: bool = False


MEASURES = (
    Measure("score", "score", low="score_low", high="score_high"),
    Measure("gold", "gold score", low="gold_low", high="gold_high"),
    Measure("win_rate", "win rate", "z.2f", low="win_rate_low", high="win_rate_high"),
    Measure(
        "win_rate_length_controlled",
        "win rate at equal lengths",
        ".2f",
        low="win_rate_length_controlled_low",
        high="win_rate_length_controlled_high",
    ),
    Measure(
        "win_rate_previous",
        "win rate over the round before",
        ".2f",
        low="win_rate_previous_low",
        high="win_rate_previous_high",
        detail=True,
    ),
    Measure("kl", "KL, nats", "z.2f", "eval/drift"),
    Measure("kl_initial", "KL to initial, nats", "z.2f", "eval/drift"),
    Measure("kl_initial_per_token", "KL to initial, nats a token", "z.3f", "eval/drift", detail=True),
    Measure("kl_initial_k3", "KL to initial by k3, nats", "z.2f", "eval/drift", detail=True),
    Measure("kl_initial_k3_per_token", "KL to initial by k3, nats a token", "z.3f", "eval/drift", detail=True),
    Measure("entropy", "entropy, nats a token", "z.2f", "eval/drift"),
    Measure("length", "length, tokens", "z.1f", "eval/text"),
    Measure("distinct_1", "distinct-1", "z.3f", "eval/text", detail=True),
    Measure("distinct_2", "distinct-2", "z.3f", "eval/text"),
    Measure("distinct_3", "distinct-3", "z.3f", "eval/text", detail=True),
    Measure("seq_rep_4", "repeated 4-grams", "z.3f", "eval/text", detail=True),
    Measure("eos_rate", "EOS rate", "z.2f", "eval/text"),
    Measure("truncated_rate", "truncated", "z.2f", "eval/text", detail=True),
)
"""Of samples; KL without more words is that to the reference.

MLflow sorts sections by name: `eval` stands before `logps` and `rewards`, which are TRL's.
"""

BOOKKEEPING = frozenset({"completions", "unscored", "gold_unscored", "rows"})
"""How much was measured."""

_HELD_OUT = ("rewards/margins", "rewards/accuracies", "loss", "logps/accuracies", "mean_token_accuracy")
Values = Mapping[str, float | None]


def measured(evaluation: AnyEvaluation) -> dict[str, float | None]:
    """Names to values, bounds and counts included, but for those of capability; None is what was not measured."""
    match evaluation:
        case Evaluation():
            numbers = {name: value for name, value in asdict(evaluation).items() if not isinstance(value, dict)}
            return {**numbers, **evaluation.win_rates}
        case HeldOutEvaluation():
            bounds = {f"{evaluation.metric}_low": evaluation.low, f"{evaluation.metric}_high": evaluation.high}
            return {**evaluation.metrics, evaluation.metric: evaluation.value, **bounds, "rows": evaluation.rows}


def measures_of(evaluation: AnyEvaluation) -> tuple[Measure, ...]:
    """What an evaluation of this kind may have; the first sums it up."""
    match evaluation:
        case Evaluation():
            return MEASURES
        case HeldOutEvaluation(metric=metric):
            lead = Measure(metric, metric, low=f"{metric}_low", high=f"{metric}_high", falls=metric == "loss")
            return (lead, *(Measure(name, name) for name in _HELD_OUT if name != metric))


def shown(evaluations: Sequence[AnyEvaluation]) -> list[Measure]:
    """Columns for what any of the evaluations has; the KL to the initial policy where the reference is another one."""
    found = [measured(evaluation) for evaluation in evaluations]
    apart = any(values.get("kl_initial") != values.get("kl") for values in found)
    return [
        measure
        for measure in measures_of(evaluations[0])
        if not measure.detail
        and any(values.get(measure.name) is not None for values in found)
        and (measure.name != "kl_initial" or apart)
    ]


def written(measure: Measure, values: Values) -> str:
    """`0.610 [0.550, 0.670]`, or a dash for what was not measured."""
    value, low, high = (values.get(name) for name in (measure.name, measure.low, measure.high))
    if value is None:
        return "-"
    if low is None or high is None:
        return format(value, measure.form)
    return f"{value:{measure.form}} [{low:{measure.form}}, {high:{measure.form}}]"


_SECTIONS = {measure.name: measure.section for measure in MEASURES}


def chart_name(name: str) -> str:
    """The name of an evaluation's value in MLflow."""
    return f"run/held_out/{name}" if name in BOOKKEEPING else f"{_SECTIONS.get(name, 'eval')}/{name}"


def capability_chart(name: str, found: Collection[str]) -> str:
    """The name in MLflow of a value of capability, one of `found`: what sums a task up stands first."""
    leads = f"{name}_low" in found and not name.endswith("_change")
    return f"{'eval' if leads else 'run'}/capability/{name}"
