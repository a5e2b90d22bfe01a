"""What the answers of people come to: agreement with scorers and with each other, position bias, a calibrated judge."""

import hashlib
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raylign.config.scoring import (
    CalibratedScoringBlock,
    ScoringBlock,
    WeightedScoringBlock,
    asks_people,
    by_part,
    short_tree,
)
from raylign.evaluation.agreement import Interval, cohen_kappa, krippendorff_alpha, share_interval
from raylign.evaluation.judge_calibration import LEAST, Measured, calibrate, measure, people, raw_verdict
from raylign.report.text import escape_control
from raylign.review.choose import Scored, difference, directions, scored_answers
from raylign.review.record import FOLDER, Answer, Pair, Said, readable, share_of_first
from raylign.run.directory import RunDirectory
from raylign.run.files import publish_text

REPORT = "report.json"


@dataclass(frozen=True, slots=True)
class Agreement:
    """A scorer beside people: `same` is the share of pairs with the same verdict.

    `judge` is None where either share of the answers has less than LEAST pairs. `setting` is the option `scoring` that
    takes it, without default values; None where there is no such judge, or people contradict the scorer.
    """

    same: Interval
    kappa: Interval | None
    judge: Measured | None
    setting: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ReviewReport:
    """`review/report.json`. `chosen` counts answered pairs by how they were chosen: agreement is of these, not of all.

    `first_shown` is the share of answer A among decided answers: positions are shuffled, so that 1/2 is no bias.
    """

    pairs: int
    answered: int
    declined: int
    answers: int
    reviewers: int
    ties: int
    chosen: Mapping[str, int]
    between_people: Interval | None
    first_shown: Interval | None
    scorers: Mapping[str, Agreement]


def review_report(
    directory: RunDirectory, block: ScoringBlock, pairs: Sequence[Pair], said: Said, seed: int
) -> ReviewReport:
    """From the record and the run's scores. Raises RecordError for a damaged table of a round."""
    answers = said.by_pair()
    answered = [pair for pair in pairs if pair.id in answers]
    each = [answer for pair in answered for answer in answers[pair.id]]
    decided = [(pair, answer) for pair in answered for answer in answers[pair.id] if answer.choice != "tie"]
    scorers = dict(_scorers(scored_answers(directory, block), answered, answers, seed))
    shown_first = sum((answer.choice == "second") == pair.swapped for pair, answer in decided)
    return ReviewReport(
        pairs=len(pairs),
        answered=len(answered),
        declined=len(said.declined),
        answers=len(each),
        reviewers=len({answer.reviewer for answer in each}),
        ties=sum(answer.choice == "tie" for answer in each),
        chosen={by: sum(pair.by == by for pair in answered) for by in dict.fromkeys(pair.by for pair in answered)},
        between_people=krippendorff_alpha([[a.choice for a in answers[pair.id]] for pair in answered], seed),
        first_shown=share_interval(shown_first, len(decided)),
        scorers={name: replace(own, setting=_setting(block, name, own.judge)) for name, own in scorers.items()},
    )


def _scorers(
    scored: Sequence[Scored], answered: Sequence[Pair], answers: Mapping[str, Sequence[Answer]], seed: int
) -> Iterator[tuple[str, Agreement]]:
    by_text = {(one.round, one.prompt_id, readable(one.text)): one for one in scored}
    for name in dict.fromkeys(name for one in scored for name in one.values):
        rows: list[tuple[Pair, float, float]] = []
        for pair in answered:
            both = [by_text.get((pair.round, pair.prompt_id, text)) for text in (pair.first, pair.second)]
            if both[0] and both[1] and (gap := difference(both[0], both[1], name)) is not None:
                rows.append((pair, gap, share_of_first(answers[pair.id])))
        verdicts, truth = [raw_verdict(gap) for _, gap, _ in rows], [people(share) for _, _, share in rows]
        same = share_interval(sum(a == b for a, b in zip(verdicts, truth, strict=True)), len(rows))
        if same is not None:
            yield name, Agreement(same, cohen_kappa(verdicts, truth), _judge(rows, seed))


def _judge(rows: Sequence[tuple[Pair, float, float]], seed: int) -> Measured | None:
    """Made of the pairs of one half of the prompts, measured on those of the other."""
    made = [row for row in rows if not is_held_out(row[0].prompt_id, seed)]
    held_out = [row for row in rows if is_held_out(row[0].prompt_id, seed)]
    if min(len(made), len(held_out)) < LEAST:
        return None
    judge = calibrate([gap for _, gap, _ in made], [share for _, _, share in made])
    return measure(judge, len(made), [gap for _, gap, _ in held_out], [share for _, _, share in held_out])


def _setting(block: ScoringBlock, name: str, measured: Measured | None) -> Mapping[str, Any] | None:
    """The calibrated scorer made of scorer `name` of the run; its differences are of values where higher is better."""
    signs = directions(block)
    scorer = by_part(block)[name] if name in signs else block
    if measured is None or isinstance(scorer, CalibratedScoringBlock) or asks_people(scorer):
        return None
    judge, own = measured.judge, name.rpartition("/")[2]
    if judge.slope <= 0 or judge.band >= 0.5:
        return None
    if signs.get(name, 1.0) < 0:
        scorer = WeightedScoringBlock(scorers={own: scorer}, weights={own: -1.0})
    limit = block.max_unscored
    return short_tree(CalibratedScoringBlock(scorer=scorer, slope=judge.slope, band=judge.band, max_unscored=limit))


def is_held_out(prompt_id: str, seed: int) -> bool:
    """Whether the answers about a prompt measure the judge; more answers move no prompt from one share to the other."""
    return hashlib.sha256(f"{seed}/{prompt_id}".encode()).digest()[0] < 128


def save_report(run_dir: Path, report: ReviewReport) -> Path:
    """`review/report.json`."""
    path = run_dir / FOLDER / REPORT
    publish_text(path, json.dumps(asdict(report), indent=1))
    return path


def print_report(report: ReviewReport, console: Console) -> None:
    """For people."""

    def say(line: str) -> None:
        console.print(Text(escape_control(line)), soft_wrap=True)

    say(
        f"{report.answered} of {report.pairs} pairs answered ({report.declined} declined): {report.answers} answers of "
        f"{report.reviewers} reviewers, {report.ties} ties"
    )
    say(f"agreement between reviewers (Krippendorff's alpha): {_interval(report.between_people)}")
    say(f"answer A among decided answers (1/2 without bias): {_interval(report.first_shown)}")
    if chosen := {by: count for by, count in report.chosen.items() if by not in ("random", "scoring")}:
        told = ", ".join(f"{count} by {by}" for by, count in chosen.items())
        say(f"note: {told}: agreement below is of pairs chosen so, not of all; --by random measures it for all")
    if not report.scorers:
        return
    table = Table(title="scorers beside people, 95 % intervals")
    for column in (
        "scorer",
        "pairs",
        "same verdict",
        "Cohen's kappa",
        "calibrated: same verdict",
        "slope",
        "tie band",
        "Brier",
    ):
        table.add_column(column, justify="left" if column == "scorer" else "right")
    for name, own in report.scorers.items():
        judge = own.judge
        calibrated = (
            (
                f"{_interval(judge.agreement)}, raw {judge.raw_agreement.value:.2f}",
                *(f"{judge.judge.slope:.3g}", f"{judge.judge.band:.2f}"),
                f"{judge.brier:.3f} (coin {judge.coin_brier:.3f})",
            )
            if judge
            else (f"needs {2 * LEAST} answers", "-", "-", "-")
        )
        table.add_row(
            Text(escape_control(name)), str(own.same.count), _interval(own.same), _interval(own.kappa), *calibrated
        )
    console.print(table)
    for name, own in report.scorers.items():
        if own.setting is not None:
            tree = yaml.safe_dump({**own.setting}, default_flow_style=True, sort_keys=False, width=math.inf).strip()
            plain = not set(tree) & set('"$`\\!')
            say(
                f"to train by {name} as people judge: "
                + (f'scoring="{tree}"' if plain else shlex.quote(f"scoring={tree}"))
            )


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
