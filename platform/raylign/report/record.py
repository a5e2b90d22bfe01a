"""What reports read of a run directory: its evaluations, rounds, held-out answers, incidents and commands."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylign.config import RunConfig
from raylign.errors import RaylignError
from raylign.records import AnyEvaluation, RoundReport
from raylign.run.directory import RunDirectory
from raylign.run.files import unreadable
from raylign.tracking.journal import JOURNAL_NAME

_SAMPLES, _CANDIDATES = "samples.parquet", "candidates*.parquet"
_ANSWER_COLUMNS = ("prompt_id", "index", "messages", "text", "score", "score_reason")
_INCIDENT = b'"event": "incident"'


@dataclass(frozen=True, slots=True)
class Answer:
    """A held-out completion. `prompt` is the last message; `score` is None where the scorer gave none, and why."""

    prompt_id: str
    prompt: str
    text: str
    score: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Incident:
    """An actor that was lost or replaced, as the journal has it; `time` is in epoch seconds."""

    time: float
    round: int
    role: str
    happened: str
    detail: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Made by `read_run`, read by the verdict, figures and pages.

    `before` and `after` are the held-out answers of the initial and of the newest policy. `lags[r]` counts candidates
    of round r by how many versions older their sampler was than the policy that the round began with.
    """

    path: Path
    config: RunConfig
    baseline: AnyEvaluation | None
    reports: tuple[RoundReport, ...]
    before: tuple[Answer, ...]
    after: tuple[Answer, ...]
    lags: Mapping[int, Mapping[int, int]]
    incidents: tuple[Incident, ...]

    @property
    def evaluations(self) -> tuple[tuple[int, AnyEvaluation], ...]:
        """Rounds and their evaluations, round 0 being the model before training."""
        first = () if self.baseline is None else ((0, self.baseline),)
        return (*first, *((report.index, report.evaluation) for report in self.reports))

    @property
    def what(self) -> dict[str, str]:
        """Recipe, model, rows, loss and scorer by name."""
        return about(self.config.model_dump(mode="json"))

    @property
    def commands(self) -> dict[str, str]:
        """What a person may want to do next, and the command for it."""
        run = str(self.path)
        lines = {
            "resume": ["raylign", "resume", run],
            "export": ["raylign", "export", run, "--to", "exported"],
            "compare": ["raylign", "compare", run, "OTHER_RUN"],
            "report": ["raylign", "review", "show", run],
        }
        return {name: shlex.join(words) for name, words in lines.items()}


def read_run(directory: RunDirectory) -> RunRecord:
    """What is there so far. Raises RaylignError when a file of it cannot be read."""
    try:
        baseline = directory.baseline()
    except RaylignError:
        if directory.reports():
            raise
        baseline = None
    reports = tuple(directory.reports())
    newest = directory.round(reports[-1].index) if reports else None
    return RunRecord(
        directory.path,
        directory.config(),
        baseline,
        reports,
        _answers(directory.round(0) / _SAMPLES),
        () if newest is None else _answers(newest / _SAMPLES),
        {report.index: lags for report in reports if (lags := _lags(directory.round(report.index), report.index))},
        tuple(_incidents(directory.path / JOURNAL_NAME)),
    )


def about(config: Mapping[str, Any]) -> dict[str, str]:
    """What a run is of, from its settings as a tree: names to look for in a list of runs."""
    scoring = config.get("scoring") or {}
    rows = (config.get("prompts") or config.get("data") or {}).get("source")
    found = {
        "recipe": config.get("recipe"),
        "model": config.get("model", {}).get("path"),
        "rows": rows,
        "loss": config.get("loss", {}).get("loss_type"),
        "scorer": scoring.get("function") or scoring.get("model") or scoring.get("path") or scoring.get("type"),
    }
    return {name: str(value) for name, value in found.items() if value}


def _answers(path: Path) -> tuple[Answer, ...]:
    if not path.is_file():
        return ()
    return tuple(
        Answer(row["prompt_id"], _last_message(row["messages"]), row["text"], row["score"], row["score_reason"])
        for row in _table(path, _ANSWER_COLUMNS)
    )


def _table(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, columns=list(columns)).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(path, str(error).partition("\n")[0], "restore it from a copy") from error
    if rows and rows[0].keys() != set(columns):
        raise unreadable(path, f"it lacks columns of {list(columns)}", "restore it from a copy")
    return rows


def _last_message(messages: str) -> str:
    try:
        content = json.loads(messages)[-1]["content"]
    except (ValueError, TypeError, LookupError):
        return messages
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _lags(folder: Path, index: int) -> dict[int, int]:
    found: Counter[int] = Counter()
    for path in sorted(folder.glob(_CANDIDATES)):
        found.update(index - 1 - row["policy_version"] for row in _table(path, ("policy_version",)))
    return dict(sorted(found.items()))


def _incidents(journal: Path) -> list[Incident]:
    """Only their lines are parsed: a journal has one for every step."""
    if not journal.is_file():
        return []
    with journal.open("rb") as file:
        return [found for line in file if _INCIDENT in line and (found := _incident(line)) is not None]


def _incident(line: bytes) -> Incident | None:
    try:
        event = json.loads(line)
        when, index = float(event.pop("time")), int(event.pop("round", 0))
        role, happened = str(event.pop("role")), str(event.pop("happened"))
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    left = {key: value for key, value in event.items() if key not in ("event", "sequence", "count", "non_finite")}
    return Incident(when, index, role, happened, ", ".join(f"{key}: {value}" for key, value in left.items()))
