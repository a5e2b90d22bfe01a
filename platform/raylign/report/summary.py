"""A run in a few lines: its table of rounds and notes on what may be wrong."""

from collections.abc import Mapping, Sequence
from typing import assert_never

from raylign.config import RunConfig
from raylign.config.evaluation import ChoiceBlock
from raylign.evaluation.guard import Decision, best_version, ended_early, measures
from raylign.records import AnyEvaluation, Evaluation, HeldOutEvaluation, RoundReport
from raylign.report.tables import NOTHING, RoundsTable, displacement_notes, round_table, step_mean, warnings
from raylign.report.text import escape_control, optional

STAGES = ("reference", "train", "evaluate")
_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "logps/accuracies", "mean_token_accuracy")


def held_out_table(baseline: HeldOutEvaluation, reports: Sequence[RoundReport]) -> RoundsTable:
    """One row per evaluation, round 0 being the model before training."""
    shown = [name for name in _SHOWN if name in baseline.metrics and name != baseline.metric]
    stages = [stage for stage in STAGES if any(stage in report.seconds for report in reports)]
    measured = (f"held-out {baseline.metric}\n[low, high]", *(f"held-out\n{name}" for name in shown))
    training = ("rows", "steps", "train\nloss", *(f"{stage}\ns" for stage in stages))
    trained = [
        [
            str(report.counts["preferences"]),
            str(len(report.steps)),
            NOTHING if (loss := step_mean(report, "loss")) is None else f"{loss:.3f}",
            *(f"{report.seconds.get(stage, 0.0):.1f}" for stage in stages),
        ]
        for report in reports
    ]
    evaluations = (baseline, *(held_out(report.evaluation) for report in reports))
    return RoundsTable(
        (0, *(report.index for report in reports)),
        (
            (measured, [_cells(evaluation, shown) for evaluation in evaluations]),
            (training, [[NOTHING] * len(training), *trained]),
        ),
    )


def held_out(evaluation: AnyEvaluation) -> HeldOutEvaluation:
    """The evaluation of a run on a data set."""
    assert isinstance(evaluation, HeldOutEvaluation)
    return evaluation


def held_out_warnings(baseline: HeldOutEvaluation, reports: Sequence[RoundReport]) -> list[str]:
    """Plain notes, with numbers; empty when all is well."""
    if not reports:
        return []
    last, notes = held_out(reports[-1].evaluation), []
    if last.low <= baseline.high and baseline.low <= last.high:
        notes.append(
            f"held-out {last.metric} went from {interval(baseline)} to {interval(last)}: the intervals overlap, so the "
            "change may be chance; raise data.held_out to tell"
        )
    notes += displacement_notes(reports)
    losses = [held_out(report.evaluation).metrics["loss"] for report in reports]
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[-1] > losses[best]:
        notes.append(
            f"held-out loss was lowest after round {reports[best].index} ({losses[best]:.3f}) and is {losses[-1]:.3f} "
            f"after round {reports[-1].index}: later rounds overfit; export --version {reports[best].index}, or train "
            "less"
        )
    return notes


def interval(evaluation: HeldOutEvaluation) -> str:
    """`0.610 [0.550, 0.670]`."""
    return f"{evaluation.value:.3f} [{evaluation.low:.3f}, {evaluation.high:.3f}]"


def _cells(evaluation: HeldOutEvaluation, shown: Sequence[str]) -> list[str]:
    return [interval(evaluation), *(f"{evaluation.metrics[name]:.3f}" for name in shown)]


def headline(evaluation: AnyEvaluation) -> str:
    """What a log line says of an evaluation."""
    return ", ".join([_quality(evaluation), *_capability(evaluation.capability)])


def _capability(found: Mapping[str, float]) -> list[str]:
    """The first measure of each task."""
    own = (name for name in found if f"{name}_low" in found and not name.endswith("_change"))
    return [f"{_words(name)} {found[name]:{_form(name, found)}}" for name in own]


def _form(name: str, found: Mapping[str, float]) -> str:
    """How the first measure of a task is written: perplexity, or a share."""
    return ".2f" if f"{name}_nats_per_token" in found else ".3f"


def _words(name: str) -> str:
    return escape_control(name.replace("_", " "))


def _quality(evaluation: AnyEvaluation) -> str:
    match evaluation:
        case Evaluation():
            apart = evaluation.kl_initial not in (None, evaluation.kl)
            initial = f", {optional(evaluation.kl_initial)} to the initial policy" if apart else ""
            gold = "" if evaluation.gold is None else f", gold {evaluation.gold:z.3f}"
            won = f", win rate {rate:.2f}" if (rate := evaluation.win_rate) is not None else ""
            kl = "" if evaluation.kl is None else f", KL {evaluation.kl:z.2f} nats"
            return f"held-out score {evaluation.score:z.3f}{gold}{kl}{initial}{won}"
        case HeldOutEvaluation():
            loss = "" if evaluation.metric == "loss" else f", loss {evaluation.metrics['loss']:.3f}"
            return f"held-out {evaluation.metric} {interval(evaluation)}{loss}"
        case _:
            assert_never(evaluation)


def alignment_tax(
    baseline: AnyEvaluation, reports: Sequence[RoundReport], choice: ChoiceBlock | None = None
) -> list[str]:
    """What training changed of capability, task by task with paired intervals; nothing where no version tells.

    Of the newest version that does, and of the one that `choice` makes the best, where that is another one.
    """
    told = {report.policy_version: parts for report in reports if (parts := _changes(baseline, report.evaluation))}
    if not told:
        return []
    newest, last = max(told), reports[-1].policy_version
    chosen = best_version(choice, measures(baseline, reports)) if choice else None
    best = chosen.version if chosen else newest
    lines = [f"alignment tax{'' if newest == last == best else f' of version {newest}'}: {', '.join(told[newest])}"]
    if best in told and best != newest:
        lines.append(f"alignment tax of version {best}, the best: {', '.join(told[best])}")
    elif best not in (0, newest):
        lines[0] += (
            f"; of version {best}, the best, it was not measured (evaluation.capability.every=1 measures every round)"
        )
    return lines


def _changes(baseline: AnyEvaluation, evaluation: AnyEvaluation) -> list[str]:
    """Task by task, `arithmetic 0.290 -> 0.280 (-0.010, -0.030 to +0.010)`."""
    found, parts = evaluation.capability, []
    for name, before in baseline.capability.items():
        if f"{name}_change" in found:
            form = _form(name, found)
            change, low, high = (found[f"{name}_change{bound}"] for bound in ("", "_low", "_high"))
            change_text = f"{change:+{form}}, {low:+{form}} to {high:+{form}}"
            parts.append(f"{_words(name)} {before:{form}} -> {found[name]:{form}} ({change_text})")
    return parts


def outcomes(
    config: RunConfig,
    baseline: AnyEvaluation,
    reports: Sequence[RoundReport],
    decisions: Mapping[int, Sequence[Decision]],
) -> list[str]:
    """What a run has come to beside its verdict, a line each: alignment tax, guard, why it ended early, best version.

    `decisions` are the guard's, by round.
    """
    if not reports:
        return []
    told = alignment_tax(baseline, reports, config.choice)
    told += [f"guard after round {index}: {own.told}" for index, made in sorted(decisions.items()) for own in made]
    measured, newest = measures(baseline, reports), reports[-1].index
    if reason := ended_early(config.rules, config.choice, decisions.get(newest, ()), measured):
        told.append(f"ended after round {newest}: {reason}")
    if (choice := config.choice) and (best := best_version(choice, measured)):
        told.append(f"best by {choice.metric_for_best_model}: version {best.version} ({best.value:.4g})")
    return told


def rounds_table(baseline: AnyEvaluation, reports: Sequence[RoundReport]) -> RoundsTable:
    """One row per evaluation, round 0 being the model before training."""
    match baseline:
        case Evaluation():
            return round_table(baseline, reports)
        case HeldOutEvaluation():
            return held_out_table(baseline, reports)
        case _:
            assert_never(baseline)


def rounds_warnings(baseline: AnyEvaluation, reports: Sequence[RoundReport], *, sure: bool = False) -> list[str]:
    """Plain notes, with numbers, on what may be wrong; `sure` as `warnings` has it."""
    match baseline:
        case Evaluation():
            return warnings(baseline, reports, sure=sure)
        case HeldOutEvaluation():
            return held_out_warnings(baseline, reports)
        case _:
            assert_never(baseline)
