"""What a run has asked people, and what they said: two files in `review/` of the run directory."""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from filelock import FileLock
from pydantic import TypeAdapter

from raylign.records import Message
from raylign.report.text import escape_control
from raylign.run.files import disk_errors, publish_text, read_record
from raylign.tracking.journal import JOURNAL_NAME, read_events

FOLDER, PAIRS, ANSWERS = "review", "pairs.json", "answers.json"
Choice = Literal["first", "second", "tie"]
Chosen = Literal["random", "uncertainty", "disagreement", "scoring"]
"""Why a pair was asked about: `raylign review send --by ...`, or as the score of a round."""
SHARE: Mapping[Choice, float] = {"first": 1.0, "second": 0.0, "tie": 0.5}
"""How much of a choice goes to the first answer."""
_TEXT = TypeAdapter(str)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two different answers to one prompt, in the order of their candidates. Made by `pair_of`, kept in pairs.json.

    `id` (32 hex digits) is the same for the same run, prompt and two texts, so that nothing is asked twice; MLflow's
    trace has it. People see `second` as answer A where `swapped`.
    """

    id: str
    round: int
    prompt_id: str
    prompt: str
    first: str
    second: str
    swapped: bool
    by: Chosen

    @property
    def shown(self) -> tuple[str, str]:
        """Answer A and answer B."""
        return (self.second, self.first) if self.swapped else (self.first, self.second)

    def choice(self, shown: Literal["A", "B", "tie"]) -> Choice:
        """What a choice among the shown answers says of the pair."""
        if shown == "tie":
            return "tie"
        return "second" if (shown == "A") == self.swapped else "first"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one person says of one pair. `time` is in milliseconds since the epoch."""

    pair: str
    reviewer: str
    choice: Choice
    why: str
    time: int


@dataclass(frozen=True, slots=True)
class Said:
    """answers.json: everything that people said so far, and pairs that they declined to answer."""

    answers: tuple[Answer, ...] = ()
    declined: tuple[str, ...] = ()

    def by_pair(self) -> dict[str, list[Answer]]:
        found: dict[str, list[Answer]] = {}
        for answer in self.answers:
            found.setdefault(answer.pair, []).append(answer)
        return found

    @property
    def settled(self) -> set[str]:
        """Pairs that somebody answered or declined."""
        return {answer.pair for answer in self.answers} | set(self.declined)


@dataclass(frozen=True, slots=True)
class _Pairs:
    pairs: tuple[Pair, ...]


_PAIRS, _SAID = TypeAdapter(_Pairs), TypeAdapter(Said)
_PAIRS_CURE = "restore it from a copy: it alone knows which answer was shown as A"
_SAID_CURE = "restore it from a copy, or remove it: `raylign review pull RUN` reads from MLflow what it still has"


class ReviewRecord:
    """`review/` of a run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.folder = run_dir, run_dir / FOLDER

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time changes it, also while the run itself is at work."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "review.lock")
            lock.acquire()
        with lock:
            yield

    def pairs(self) -> tuple[Pair, ...]:
        """In the order in which they were chosen. Raises RecordError when the file is not what a run writes."""
        path = self.folder / PAIRS
        return read_record(path, _PAIRS, _PAIRS_CURE).pairs if path.exists() else ()

    def add(self, pairs: Iterable[Pair]) -> tuple[Pair, ...]:
        """All pairs, with those of `pairs` that were not there. They are on disk before anybody is asked."""
        known = self.pairs()
        new = {pair.id: pair for pair in pairs if pair.id not in {old.id for old in known}}
        if new:
            known = (*known, *new.values())
            publish_text(self.folder / PAIRS, json.dumps({"pairs": [asdict(pair) for pair in known]}, indent=1))
        return known

    def said(self) -> Said:
        """Raises RecordError when the file is not what a run writes."""
        path = self.folder / ANSWERS
        return read_record(path, _SAID, _SAID_CURE) if path.exists() else Said()

    def keep(self, said: Said) -> None:
        if said != self.said():
            publish_text(self.folder / ANSWERS, json.dumps(asdict(said), indent=1))


def run_identity(run_dir: Path) -> str:
    """The run's own id, from its journal. Raises RaylignError when there is none."""
    started = (event for event in read_events(run_dir / JOURNAL_NAME) if event.name == "campaign_started")
    first = next(started, None)
    return first.get("campaign", _TEXT) if first else str(run_dir.name)


def pair_of(
    identity: str,
    index: int,
    prompt: tuple[str, Sequence[Message]],
    texts: tuple[str, str],
    *,
    by: Chosen,
    seed: int,
) -> Pair:
    """The pair of round `index` about a prompt (its id and messages), shuffled with `seed`."""
    first, second = (readable(text) for text in texts)
    key = json.dumps([identity, prompt[0], *sorted((first, second))])
    own = hashlib.sha256(key.encode()).hexdigest()[:32]
    swapped = random.Random(f"{seed}/{own}").random() < 0.5
    return Pair(own, index, prompt[0], conversation(prompt[1]), first, second, swapped, by)


def readable(text: str) -> str:
    """As it can be kept and shown: control characters and halves of surrogate pairs are written out."""
    return escape_control(text, keep="\n\t")


def conversation(messages: Sequence[Message]) -> str:
    """A prompt as people read it: one message of a user as it is, several behind their roles."""
    contents = [message.get("content") for message in messages]
    texts = [content if isinstance(content, str) else json.dumps(content) for content in contents]
    if [message.get("role") for message in messages] == ["user"]:
        return readable(texts[0])
    return readable("\n\n".join(f"{m.get('role')}: {text}" for m, text in zip(messages, texts, strict=True)))


def share_of_first(answers: Sequence[Answer]) -> float:
    """0..1: how much of what people say of one pair goes to its first answer; a tie is a half."""
    return fmean(SHARE[answer.choice] for answer in answers)
