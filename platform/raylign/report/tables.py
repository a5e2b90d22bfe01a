"""What a run with samples shows: a table of rounds, samples to read, and notes that point at reward hacking."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from raylign.evaluation.guard import over_optimisation
from raylign.evaluation.health import CHOSEN_CHANGE, DISPLACED, REJECTED_CHANGE
from raylign.records import AnyEvaluation, Evaluation, Prompt, RoundReport, Score
from raylign.report.console import own_stdout
from raylign.report.text import escape_control, optional

STAGES = ("sample", "score", "prefer", "reference", "train", "publish", "evaluate")
PLAIN_WIDTH = 160
SHOWN_CHARACTERS = 1200
FALL_LIMIT = 0.5
LENGTH_CHANGE_LIMIT = 0.5
KL_LIMIT_NATS = 10.0
DISPLACEMENT_LIMIT_NATS = 10.0
ACCURACY_FLOOR = 0.55
SKIPPED_LIMIT = 0.1
EVEN = 0.5
NOTHING = "-"
_SURE = 1.96
_UNBOUNDED = 10_000
"""Columns of a console that has room for everything."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out completion for people to read. Made by the evaluation stage."""

    prompt: Prompt
    completion: str
    score: Score


def report_console() -> Console:
    """Standard output; wide enough for the table of rounds when it is not a terminal."""
    out = own_stdout()
    return Console(file=out, width=None if out.isatty() else PLAIN_WIDTH)


@dataclass(frozen=True, slots=True)
class RoundsTable:
    """A row for each evaluation. Groups of columns that a console has no room for stand below, rounds before each."""

    rounds: Sequence[int]
    groups: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]]
    """Heads, and the cells of each row below them."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What rich prints."""
        told, room = list(self.groups[:1]), options.update_width(_UNBOUNDED)
        for group in self.groups[1:]:
            if Measurement.get(console, room, self._table([*told, group])).maximum > options.max_width:
                yield self._table(told)
                yield ""
                told = []
            told.append(group)
        yield self._table(told)

    def _table(self, groups: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        for header in ("round", *(header for heads, _ in groups for header in heads)):
            table.add_column(Text(header), justify="right", overflow="fold")
        for place, index in enumerate(self.rounds):
            table.add_row(str(index), *(cell for _, rows in groups for cell in rows[place]))
        return table


def round_table(baseline: Evaluation, reports: Sequence[RoundReport]) -> RoundsTable:
    """One row per evaluation, round 0 being the policy before training: what it is, its training, and seconds.

    KL is that to the reference; that to the policy before round 1 has a column where it is another one, and so have the
    gold score and the win rate over that policy where they were measured.
    """
    evaluations = [baseline, *(sampled(report.evaluation) for report in reports)]
    apart = any(evaluation.kl_initial not in (None, evaluation.kl) for evaluation in evaluations)
    golden = any(evaluation.gold is not None for evaluation in evaluations)
    compared = any(evaluation.win_rate is not None for evaluation in evaluations)
    kl_headers = ("KL\nnats", "KL to\ninitial") if apart else ("KL\nnats",)
    gold_headers, rates = ("gold\nscore",) if golden else (), ("win rate\n%",) if compared else ()
    measured = ("score [low, high]", *gold_headers, *rates, *kl_headers, "length\ntokens", "distinct\n-2", "EOS\nrate")
    shown = [_evaluation_cells(one, apart=apart, golden=golden, compared=compared) for one in evaluations]
    training = ("pairs\nkept", "first\nloss", "rewards/\naccuracies", "rewards/\nmargins")
    stages = tuple(dict.fromkeys((*STAGES, *(stage for report in reports for stage in report.seconds))))
    seconds = [[_seconds_cell(report.seconds.get(stage)) for stage in stages] for report in reports]
    return RoundsTable(
        (0, *(report.index for report in reports)),
        (
            (measured, shown),
            (training, [[NOTHING] * len(training), *map(_training_cells, reports)]),
            (tuple(f"{stage}\ns" for stage in stages), [[NOTHING] * len(stages), *seconds]),
        ),
    )


def samples_block(title: str, before: Sequence[Sample], after: Sequence[Sample]) -> RenderableType:
    """Each held-out prompt with its completion before and after training, and the scores.

    `before` and `after` are parallel and of the same prompts (ValueError otherwise). Model output is shown as plain
    text with control characters written out.
    """
    if [sample.prompt.id for sample in before] != [sample.prompt.id for sample in after]:
        raise ValueError("samples before and after are not of the same prompts in the same order")
    parts: list[RenderableType] = [Rule(Text(title), characters="-")]
    for first, last in zip(before, after, strict=True):
        parts += [Text(f"prompt {first.prompt.id}", style="bold"), _indented(_last_message(first.prompt))]
        parts += [Text(f"before, score {_score_text(first.score)}", style="bold"), _indented(first.completion)]
        parts += [Text(f"after, score {_score_text(last.score)}", style="bold"), _indented(last.completion), Text("")]
    return Group(*parts)


def warnings(baseline: Evaluation, reports: Sequence[RoundReport], *, sure: bool = False) -> list[str]:
    """Plain notes, with numbers, on what may be reward hacking or training without effect; empty when all is well.

    `sure`: a comparison prompt by prompt says that the change of the score is no chance. A win rate is one too.
    """
    if not reports:
        return []
    last = sampled(reports[-1].evaluation)
    notes = [
        *_fall_note("distinct-2", baseline.distinct_2, last.distinct_2, "completions repeat themselves"),
        *_eos_notes(baseline, last),
        *_length_notes(baseline.length, last.length),
        *_kl_notes(last),
    ]
    notes += win_rate_notes(last)
    sure = sure or not _may_be_even(last.win_rate_low, last.win_rate_high)
    if not sure and last.score_low <= baseline.score_high and baseline.score_low <= last.score_high:
        notes.append(
            f"score went from {_interval_text(baseline)} to {_interval_text(last)}: the intervals overlap, so the "
            "change may be chance; raise prompts.held_out or evaluation.num_generations to tell"
        )
    return [
        *notes,
        *over_optimisation([baseline, *(report.evaluation for report in reports)]),
        *displacement_notes(reports),
        *_accuracy_notes(reports),
        *_skipped_notes(reports),
    ]


def _fall_note(name: str, before: float, after: float, meaning: str) -> list[str]:
    if after >= before * (1 - FALL_LIMIT):
        return []
    return [
        f"{name} fell from {before:.2f} to {after:.2f} ({after / before - 1:.0%}): {meaning}; "
        "read the samples before trusting the score"
    ]


def _eos_notes(before: Evaluation, after: Evaluation) -> list[str]:
    """Where the two shares differ by more than 1.96 standard errors (the pooled test of two proportions)."""
    first, last = before.completions, after.completions
    share = (before.eos_rate * first + after.eos_rate * last) / max(1, first + last)
    error = math.sqrt(share * (1 - share) * (1 / max(1, first) + 1 / max(1, last)))
    if before.eos_rate - after.eos_rate <= _SURE * error:
        return []
    return _fall_note("EOS rate", before.eos_rate, after.eos_rate, "completions run into the length limit")


def _length_notes(before: float, after: float) -> list[str]:
    if abs(after - before) <= LENGTH_CHANGE_LIMIT * before:
        return []
    change = f" ({after / before - 1:+.0%})" if before else ""
    return [
        f"mean length went from {before:.1f} to {after:.1f} tokens{change}: "
        "the scorer may reward length rather than quality"
    ]


def win_rate_notes(last: Evaluation, over: str = "the initial policy") -> list[str]:
    """Less than half of what is won is left at equal lengths, and that may be chance."""
    rate, equal = last.win_rate, last.win_rate_length_controlled
    if rate is None or equal is None or _may_be_even(last.win_rate_low, last.win_rate_high) or rate < EVEN:
        return []
    bounds = last.win_rate_length_controlled_low, last.win_rate_length_controlled_high
    if not _may_be_even(*bounds) or equal - EVEN >= (rate - EVEN) / 2:
        return []
    return [
        f"the win rate over {over} is {rate:.2f}, and at equal lengths {equal:.2f}, which may be "
        "chance: the scorer may reward length rather than quality; set pairing.length_penalty, or pairing.type="
        "length_matched"
    ]


def _may_be_even(low: float | None, high: float | None) -> bool:
    return low is None or high is None or low <= EVEN <= high


def _kl_notes(last: Evaluation) -> list[str]:
    measured = (("initial policy", last.kl_initial), ("reference", last.kl))
    far = [
        f"KL to the {name} is {kl:.1f} nats per completion (noted above {KL_LIMIT_NATS:g}): the policy has moved far; "
        "if the samples got worse, raise loss.beta or train fewer rounds"
        for name, kl in measured
        if kl is not None and kl > KL_LIMIT_NATS
    ][:1]
    if last.kl is None or last.kl_initial is not None:
        return far
    return [
        "KL to the initial policy is not known: no copy of it is kept beside this reference, and the KL shown is that "
        "to the reference alone; to tell how far the policy has moved, train an adapter (model.lora) or set "
        "reference.policy=initial",
        *far,
    ]


def displacement_notes(reports: Sequence[RoundReport]) -> list[str]:
    """On the newest round."""
    health = reports[-1].health
    if health.get(DISPLACED, 0.0) <= DISPLACEMENT_LIMIT_NATS:
        return []
    return [
        f"log-probs of chosen and rejected answers both fell below the reference's, by {-health[CHOSEN_CHANGE]:.1f} "
        f"and {-health[REJECTED_CHANGE]:.1f} nats in round {reports[-1].index} (noted above "
        f"{DISPLACEMENT_LIMIT_NATS:g}): something else got likelier (likelihood displacement); read the samples, raise "
        "loss.beta or add sft to a mix"
    ]


def _accuracy_notes(reports: Sequence[RoundReport]) -> list[str]:
    """Round 1 starts at the reference, where every implicit reward is 0, so one round says nothing."""
    accuracy = step_mean(reports[-1], "rewards/accuracies")
    if len(reports) < 2 or accuracy is None or accuracy >= ACCURACY_FLOOR:
        return []
    return [
        f"rewards/accuracies is {accuracy:.2f} in round {reports[-1].index} (noted below {ACCURACY_FLOOR:g}, chance is "
        "0.5): the policy does not tell chosen from rejected; raise trainer.learning_rate or schedule.prompts_per_round"
    ]


def _skipped_notes(reports: Sequence[RoundReport]) -> list[str]:
    steps = [step for report in reports for step in report.steps]
    skipped = sum(step.get("skipped_steps", 0.0) for step in steps)
    if skipped <= SKIPPED_LIMIT * len(steps):
        return []
    return [
        f"{skipped:.0f} of {len(steps)} steps were skipped because their gradients overflowed float16 (noted above "
        f"{SKIPPED_LIMIT:.0%}), and their preferences were not learned from; set model.dtype=bfloat16 or float32"
    ]


def sampled(evaluation: AnyEvaluation) -> Evaluation:
    """The evaluation of a run with samples."""
    assert isinstance(evaluation, Evaluation)
    return evaluation


def _evaluation_cells(evaluation: Evaluation, *, apart: bool, golden: bool, compared: bool) -> list[str]:
    return [
        _interval_text(evaluation),
        *([_cell(evaluation.gold, "z.3f")] if golden else []),
        *([_percentages(evaluation)] if compared else []),
        optional(evaluation.kl),
        *([optional(evaluation.kl_initial)] if apart else []),
        f"{evaluation.length:.1f}",
        f"{evaluation.distinct_2:.3f}",
        f"{evaluation.eos_rate:.2f}",
    ]


def _training_cells(report: RoundReport) -> list[str]:
    first_loss = report.steps[0].get("loss") if report.steps else None
    return [
        str(report.counts["preferences"]),
        _cell(first_loss, ".3f"),
        _cell(step_mean(report, "rewards/accuracies"), ".2f"),
        _cell(step_mean(report, "rewards/margins"), "z.3f"),
    ]


def step_mean(report: RoundReport, metric: str) -> float | None:
    """Mean over the round's steps that have the metric."""
    values = [step[metric] for step in report.steps if metric in step]
    return fmean(values) if values else None


def _cell(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _seconds_cell(seconds: float | None) -> str:
    return _cell(seconds, ".1f" if seconds is not None and seconds < 100 else ".0f")


def _interval_text(evaluation: Evaluation) -> str:
    return f"{evaluation.score:z.3f} [{evaluation.score_low:z.3f}, {evaluation.score_high:z.3f}]"


def _percentages(evaluation: Evaluation) -> str:
    """`62 [51-73]`: a win rate and its interval."""
    rate, low, high = evaluation.win_rate, evaluation.win_rate_low, evaluation.win_rate_high
    if rate is None or low is None or high is None:
        return NOTHING
    return f"{100 * rate:.0f} [{100 * low:.0f}-{100 * high:.0f}]"


def _score_text(score: Score) -> str:
    return f"none ({escape_control(score.reason)})" if score.value is None else f"{score.value:z.3f}"


def _last_message(prompt: Prompt) -> str:
    content = prompt.messages[-1]["content"] if prompt.messages else ""
    return content if isinstance(content, str) else repr(content)


def _indented(text: str) -> RenderableType:
    left_out = len(text) - SHOWN_CHARACTERS
    ending = f" ... ({left_out} more characters)" if left_out > 0 else ""
    return Padding(Text(escape_control(text[:SHOWN_CHARACTERS], keep="\n\t") + ending), (0, 0, 0, 2), expand=False)
