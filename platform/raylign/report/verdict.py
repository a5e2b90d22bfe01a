"""Whether training has helped, in one word and one sentence."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

import numpy as np

from raylign.config import EvaluateConfig, OnlineDpoConfig
from raylign.config.scoring import HumanScoringBlock
from raylign.evaluation.comparison import Comparison
from raylign.evaluation.held_out import mean_interval
from raylign.records import Evaluation, HeldOutEvaluation
from raylign.report.measures import measured, measures_of, written
from raylign.report.record import Answer, RunRecord
from raylign.report.summary import outcomes, rounds_warnings
from raylign.report.tables import EVEN, win_rate_notes

Word = Literal["better", "worse", "unclear", "untrained"]
_OPENINGS: Mapping[Word, str] = {"better": "Better", "worse": "Worse", "unclear": "No clear change"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`notes` are plain sentences on what may be wrong, or reward hacking, whatever the word is.

    `outcomes` are what else there is to know: what `raylign.report.summary.outcomes` has.
    """

    word: Word
    sentence: str
    notes: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()


def verdict(record: RunRecord) -> Verdict:
    """The newest policy against the initial one, by the value that sums their evaluations up.

    What the recipe `evaluate` has compared is judged by the win rate over the first opponent.

    Scores are compared prompt by prompt: the interval is that of the mean difference (percentile bootstrap over
    prompts), and a change is one where it does not hold 0. Rows of a data set leave only their mean and its interval,
    so there a change is one where the two intervals do not overlap.
    """
    if record.comparison is not None:
        return _won(record.comparison)
    if record.baseline is None or not record.reports:
        compares = isinstance(record.config, EvaluateConfig)
        left = "the comparison is not finished" if compares else "no round is finished"
        return Verdict("untrained", f"Nothing to tell yet: {left}.")
    last = record.reports[-1].evaluation
    lead = measures_of(record.baseline)[0]
    both = [written(lead, measured(each)) for each in (record.baseline, last)]
    rounds = f"{len(record.reports)} of {record.config.rounds} rounds"
    words = f"held-out {lead.title}{_held_out_by(record)} went from {both[0]} to {both[1]} in {rounds}"
    word, change = _compared(record)
    notes = tuple(rounds_warnings(record.baseline, record.reports, sure=word in ("better", "worse")))
    gold = _gold_change(record)
    others = (*gold, *outcomes(record.config, record.baseline, record.reports, record.decisions))
    return Verdict(word, f"{_OPENINGS[word]}: {words}{change}.", notes, others)


def _held_out_by(record: RunRecord) -> str:
    """Who scores held-out completions, where that is not who scores those that are trained on."""
    scoring = record.config.scoring if isinstance(record.config, OnlineDpoConfig) else None
    return f" by {scoring.held_out.title}" if isinstance(scoring, HumanScoringBlock) else ""


def _won(found: Comparison) -> Verdict:
    """By the win rate over the first opponent, whether its interval holds a half."""
    first = next(iter(found.opponents.values()))
    won = first.overall
    word: Word = "better" if won.low > EVEN else "worse" if won.high < EVEN else "unclear"
    opening = "No clear difference" if word == "unclear" else _OPENINGS[word]
    rate = f"{won.rate:.3f} [{won.low:.3f}, {won.high:.3f}]"
    on = f"{found.confidence:.0%} interval, {won.prompts} prompts, ties are half a win"
    sentence = f"{opening}: {found.policy} has a win rate of {rate} over {first.against}, by {found.scorer} ({on})."
    notes = win_rate_notes(found.evaluation, over=first.against)
    if won.missing:
        notes.append(f"{won.missing} prompts have no scored answer of both sides and are left out")
    return Verdict(word, sentence, tuple(notes))


def _compared(record: RunRecord) -> tuple[Word, str]:
    before, after = record.baseline, record.reports[-1].evaluation
    if isinstance(before, HeldOutEvaluation) and isinstance(after, HeldOutEvaluation):
        sign = -1 if before.metric == "loss" else 1
        if before.low <= after.high and after.low <= before.high:
            return "unclear", "; the intervals overlap"
        return _word(sign * (after.value - before.value)), "; the intervals do not overlap"
    assert isinstance(before, Evaluation) and isinstance(after, Evaluation)
    gains = paired_gains(record.before, record.after)
    if not gains or not isinstance(record.config, OnlineDpoConfig):
        apart = before.score_low > after.score_high or after.score_low > before.score_high
        return (_word(after.score - before.score) if apart else "unclear"), ""
    low, high, span = mean_gain(gains, record.config)
    found = f", by {span} prompt by prompt ({record.config.confidence:.0%} interval, {len(gains)} prompts)"
    return ("unclear" if low <= 0 <= high else _word(low)), found


def mean_gain(gains: Sequence[float], config: OnlineDpoConfig) -> tuple[float, float, str]:
    """The bounds of the mean, and `+0.110 [+0.090, +0.130]`."""
    low, high = mean_interval(np.array(gains), config.evaluation, config.run.seed)
    return low, high, f"{fmean(gains):+z.3f} [{low:+z.3f}, {high:+z.3f}]"


def _gold_change(record: RunRecord) -> list[str]:
    """What the scorer that nobody trains on says of the same answers."""
    before, after = ([replace(one, score=one.gold) for one in answers] for answers in (record.before, record.after))
    gains = paired_gains(before, after)
    if not gains or not isinstance(record.config, OnlineDpoConfig):
        return []
    low, high, span = mean_gain(gains, record.config)
    told = "may be chance" if low <= 0 <= high else "rose" if low > 0 else "fell"
    return [f"gold score: {span} prompt by prompt ({told}), by a scorer that no round trains on"]


def _word(gain: float) -> Word:
    return "better" if gain > 0 else "worse"


def paired_gains(before: Iterable[Answer], after: Iterable[Answer]) -> list[float]:
    """By prompt that both have scored answers of: how much higher the mean score is after."""
    first, last = _means(before), _means(after)
    return [last[prompt] - score for prompt, score in first.items() if prompt in last]


def _means(answers: Iterable[Answer]) -> dict[str, float]:
    found: defaultdict[str, list[float]] = defaultdict(list)
    for answer in answers:
        if answer.score is not None:
            found[answer.prompt_id].append(answer.score)
    return {prompt: fmean(scores) for prompt, scores in found.items()}
