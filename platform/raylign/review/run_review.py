"""Between a run directory and MLflow's queue: sends what was chosen, keeps what people answer."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from raylign.boundary.secrets import without_credentials
from raylign.config import RunConfig
from raylign.errors import TrackingError
from raylign.report.text import one_line
from raylign.review.record import Answer, Chosen, Pair, ReviewRecord, Said, readable
from raylign.run.directory import run_path
from raylign.tracking.review_queue import Given, Question, Read, ReviewQueue
from raylign.tracking.uri import default_uri

log = logging.getLogger(__name__)
Shown = Literal["A", "B", "tie"]
_SHOWN = 40


@dataclass(frozen=True, slots=True)
class Pulled:
    """What reading a queue came to. `unusable` are answers that are no choice; `unknown` pairs are not in MLflow."""

    said: Said
    unusable: int
    unknown: int
    strangers: int


class RunReview:
    """The record of one run's review and its queue in MLflow. Every method raises TrackingError, naming the cure."""

    def __init__(self, config: RunConfig) -> None:
        """Connects to MLflow."""
        self._config, self.record = config, ReviewRecord(run_path(config.run))
        self._uri = default_uri(config.tracking, self.record.run_dir)
        with self._asking("nothing is lost"):
            self._queue = ReviewQueue(self._uri, config.tracking.experiment, f"{self.record.run_dir.name}: pairs")

    @contextmanager
    def _asking(self, meanwhile: str) -> Iterator[None]:
        """What MLflow fails at becomes an error with its address; `meanwhile` says what became of the questions."""
        try:
            yield
        except TrackingError as error:
            failure = TrackingError(
                f"MLflow at {without_credentials(self._uri)}, where people answer, fails ({error}); {meanwhile}"
            )
            failure.cure = error.cure or "put it right and run the same command again"
            raise failure from error

    def send(self, pairs: Iterable[Pair]) -> int:
        """Record `pairs`, then put every open one into the queue that is not there; returns how many that were.

        One that was answered, and whose trace was deleted since, would come back without its answers.
        """
        known, settled = self.record.add(pairs), self.record.said().settled
        with self._asking(f"all {len(known)} questions are kept in {self.record.folder}"):
            return self._queue.send([self._question(pair) for pair in known if pair.id not in settled])

    def pull(self) -> Pulled:
        """Read what people said, and keep it. What MLflow has lost since it was read before stays."""
        pairs = {pair.id: pair for pair in self.record.pairs()}
        with self._asking(f"answers that were read before are in {self.record.folder}"):
            read = self._queue.read([*pairs])
        answers, unusable = _usable(read.given, pairs)
        said = _joined(self.record.said(), answers, read)
        self.record.keep(said)
        return Pulled(said, unusable, len(read.unknown), read.strangers)

    def address(self) -> str:
        """Where people answer."""
        with self._asking("nothing is lost"):
            return self._queue.address()

    def _question(self, pair: Pair) -> Question:
        tags = {"raylign.run": self.record.run_dir.name, "raylign.round": str(pair.round)}
        answer_a, answer_b = (text or "(empty)" for text in pair.shown)
        return Question(pair.id, pair.prompt, answer_a, answer_b, tags)


def new_pairs(known: Sequence[Pair], chosen: Iterable[Pair], by: Chosen, count: int) -> list[Pair]:
    """The first of `chosen` that are not `known`, so that `count` pairs were chosen `by` it, all told."""
    ids = {pair.id for pair in known}
    fresh: dict[str, Pair] = {}
    for pair in chosen:
        if len(fresh) >= count - sum(own.by == by for own in known):
            break
        if pair.id not in ids:
            fresh.setdefault(pair.id, pair)
    return [*fresh.values()]


def _usable(given: Sequence[Given], pairs: dict[str, Pair]) -> tuple[list[Answer], int]:
    """Answers in terms of the pairs, and how many are no choice; the first of these is said."""
    found: list[Answer] = []
    wrong: list[Given] = []
    for one in given:
        shown: Shown | None = next((choice for choice in get_args(Shown) if one.choice == choice), None)
        if shown is None:
            wrong.append(one)
            continue
        reviewer, why = readable(one.reviewer), readable(one.why)
        found.append(Answer(one.id, reviewer, pairs[one.id].choice(shown), why, one.time))
    if wrong:
        log.warning(
            "%d answer(s) are none of A, B and tie and left out; the first is %s's %s about trace tr-%s: correct it in "
            "MLflow",
            len(wrong),
            one_line(wrong[0].reviewer, _SHOWN),
            one_line(repr(wrong[0].choice), _SHOWN),
            wrong[0].id,
        )
    return found, len(wrong)


def _joined(before: Said, answers: Sequence[Answer], read: Read) -> Said:
    """What MLflow says now of the pairs it has; of the others what it said before.

    A declined pair stays so until somebody answers it: with its queue MLflow loses who declined.
    """
    kept = [answer for answer in before.answers if answer.pair in read.unknown]
    declined = {*before.declined, *read.declined} - {answer.pair for answer in (*kept, *answers)}
    ordered = sorted((*kept, *answers), key=lambda answer: (answer.time, answer.pair, answer.reviewer))
    return Said(tuple(ordered), tuple(sorted(declined)))
