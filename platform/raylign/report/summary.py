"""One campaign in a few lines, whichever kind of evaluation it has."""

from collections.abc import Sequence
from typing import assert_never

from rich.table import Table

from raylign.records import AnyEvaluation, Evaluation, HeldOutEvaluation, RoundReport
from raylign.report.held_out import held_out_table, held_out_warnings, interval
from raylign.report.tables import round_table, warnings
from raylign.report.text import optional


def headline(evaluation: AnyEvaluation) -> str:
    """What a log line says of an evaluation."""
    match evaluation:
        case Evaluation():
            apart = evaluation.kl_initial not in (None, evaluation.kl)
            initial = f", {optional(evaluation.kl_initial)} to the initial policy" if apart else ""
            return f"held-out score {evaluation.score:.3f}, KL {optional(evaluation.kl)} nats{initial}"
        case HeldOutEvaluation():
            loss = "" if evaluation.metric == "loss" else f", loss {evaluation.metrics['loss']:.3f}"
            return f"held-out {evaluation.metric} {interval(evaluation)}{loss}"
        case _:
            assert_never(evaluation)


def rounds_table(baseline: AnyEvaluation, reports: Sequence[RoundReport]) -> Table:
    """One row per evaluation, round 0 being the model before training."""
    match baseline:
        case Evaluation():
            return round_table(baseline, reports)
        case HeldOutEvaluation():
            return held_out_table(baseline, reports)
        case _:
            assert_never(baseline)


def rounds_warnings(baseline: AnyEvaluation, reports: Sequence[RoundReport]) -> list[str]:
    """Plain notes, with numbers, on what may be wrong."""
    match baseline:
        case Evaluation():
            return warnings(baseline, reports)
        case HeldOutEvaluation():
            return held_out_warnings(baseline, reports)
        case _:
            assert_never(baseline)
