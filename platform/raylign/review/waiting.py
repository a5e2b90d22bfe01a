"""Rounds that train on what people say: asks about every pair of candidates, and ends the run until they answered."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

from raylign.config import OnlineDpoConfig
from raylign.config.scoring import asks_people
from raylign.errors import ConfigError, TrackingError, Waiting
from raylign.records import Candidate, Prompt
from raylign.review.record import Answer, Pair, ReviewRecord, pair_of, readable, run_identity, share_of_first
from raylign.run.directory import RunDirectory, run_path
from raylign.scoring.composition import PEOPLE
from raylign.tracking.journal import JOURNAL_NAME, read_events
from raylign.tracking.tracker import open_tracker

log = logging.getLogger(__name__)
Texts = tuple[str, str]


def with_answers(
    config: OnlineDpoConfig, index: int, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
) -> Sequence[Prompt]:
    """The prompts with what people said of their candidates in `meta`; as they are where the scorer asks no people.

    Questions without an answer are put into the queue, and what was corrected since it was read counts as it is now.
    Raises Waiting when questions are still open.
    """
    if not asks_people(config.scoring):
        return prompts
    record = ReviewRecord(run_path(config.run))
    pairs = [*_questions(config, record, index, prompts, candidates)]
    with record.locked():
        _require_answers(config, record, pairs, anew=True)
        by_pair = record.said().by_pair()
    return [
        replace(prompt, meta={**prompt.meta, PEOPLE: shares})
        for prompt, shares in _shares(prompts, candidates, pairs, by_pair)
    ]


def require_answers(config: OnlineDpoConfig) -> None:
    """Before actors start: raises Waiting while a round's questions of an earlier start still have no answer."""
    record = ReviewRecord(run_path(config.run))
    if not asks_people(config.scoring) or not record.folder.is_dir():
        return
    try:
        with record.locked():
            _require_answers(config, record, _of_rounds(record), anew=False)
    except Waiting:
        _record_waiting(config)
        raise


def _record_waiting(config: OnlineDpoConfig) -> None:
    """A start that was killed did not say that the run waits: MLflow would go on showing it at work."""
    directory = RunDirectory(run_path(config.run))
    names = [event.name for event in read_events(directory.path / JOURNAL_NAME)]
    if names[-1:] == ["campaign_finished"]:
        return
    try:
        with directory.locked():
            open_tracker(directory.path, config.tracking).close("SCHEDULED")
    except ConfigError:
        return  # another process is at work on the run, and says itself how it ends


def _require_answers(config: OnlineDpoConfig, record: ReviewRecord, pairs: Sequence[Pair], *, anew: bool) -> None:
    """MLflow is asked where the record does not have every answer, and `anew` in any case. Raises Waiting."""
    is_open = _open(pairs, record) > 0
    if not pairs or not (is_open or anew):
        return
    from raylign.review.run_review import RunReview  # noqa: PLC0415 - MLflow, for runs that ask people alone

    try:
        run_review = RunReview(config)
        if is_open:
            run_review.send(pairs)
        run_review.pull()
    except TrackingError as error:
        if is_open:
            raise
        log.warning("%s; the round is scored by the answers that were read before", error)
        return
    if left := _open(pairs, record):
        raise Waiting(
            f"waiting for people: {left} of {len({pair.id for pair in pairs})} questions have no answer yet; answer "
            f"them at {run_review.address()} and run the same command again"
        )


def open_questions(run_dir: Path) -> int:
    """Questions of the run's rounds that have no answer on record. Raises RecordError."""
    record = ReviewRecord(run_dir)
    return _open(_of_rounds(record), record)


def _of_rounds(record: ReviewRecord) -> list[Pair]:
    """What a round is scored by, not what `raylign review send` chose."""
    return [pair for pair in record.pairs() if pair.by == "scoring"]


def _open(pairs: Sequence[Pair], record: ReviewRecord) -> int:
    """How many nobody has answered or declined."""
    return len({pair.id for pair in pairs} - record.said().settled)


def _questions(
    config: OnlineDpoConfig,
    record: ReviewRecord,
    index: int,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
) -> list[Pair]:
    """Every two different candidates of a prompt."""
    identity, by_id = run_identity(record.run_dir), {prompt.id: prompt for prompt in prompts}
    found: dict[str, Pair] = {}
    for own in _by_prompt(candidates).values():
        prompt = by_id[own[0].prompt_id]
        for one, other in combinations(own, 2):
            if readable(one.text) != readable(other.text):
                about, texts = (prompt.id, prompt.messages), (one.text, other.text)
                pair = pair_of(identity, index, about, texts, by="scoring", seed=config.run.seed)
                found.setdefault(pair.id, pair)
    known = {pair.id: pair for pair in record.pairs()}
    return [known.get(pair.id, pair) for pair in found.values()]


def _by_prompt(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.prompt_id, []).append(candidate)
    return groups


def _shares(
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    pairs: Sequence[Pair],
    answers: Mapping[str, Sequence[Answer]],
) -> list[tuple[Prompt, dict[str, float]]]:
    """Each prompt with the share of wins of its candidates by text; what was compared with none has no entry."""
    won: dict[tuple[str, Texts], float] = {}
    for pair in pairs:
        if pair.id in answers:
            share = share_of_first(answers[pair.id])
            won[pair.prompt_id, (pair.first, pair.second)] = share
            won[pair.prompt_id, (pair.second, pair.first)] = 1 - share
    groups = _by_prompt(candidates)
    return [(prompt, _wins(prompt.id, groups.get(prompt.id, []), won)) for prompt in prompts]


def _wins(prompt_id: str, group: Sequence[Candidate], won: Mapping[tuple[str, Texts], float]) -> dict[str, float]:
    """Against every other candidate; one of the same text is a tie."""
    texts, found = [readable(candidate.text) for candidate in group], {}
    for place, candidate in enumerate(group):
        own = texts[place]
        others = [text for other, text in enumerate(texts) if other != place]
        known = [0.5 if text == own else won.get((prompt_id, (own, text))) for text in others]
        if shares := [share for share in known if share is not None]:
            found[candidate.text] = fmean(shares)
    return found
