"""What reports read of a run directory: its evaluations, rounds, held-out answers, incidents and commands."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from raylign.config import EvaluateConfig, RewardModelConfig, RunConfig
from raylign.config.evaluation import GOLD
from raylign.errors import RaylignError
from raylign.evaluation.comparison import OF_A_RUN, Comparison
from raylign.evaluation.guard import Decision
from raylign.records import AnyEvaluation, RoundReport
from raylign.run.directory import REPORT_NAME, RunDirectory
from raylign.run.files import read_record, unreadable
from raylign.tracking.journal import JOURNAL_NAME

_SAMPLES, _CANDIDATES = "samples.parquet", "candidates*.parquet"
_OF_POLICY, _OF_OPPONENT = "candidates.parquet", "candidates-1.parquet"
"""Of the recipe `evaluate`, which scores its sides one after the other."""
_COMPARISON = TypeAdapter(Comparison)
_ANSWER_COLUMNS = ("prompt_id", "index", "messages", "text", "score", "score_parts", "score_reason")
_INCIDENT = b'"event": "incident"'


@dataclass(frozen=True, slots=True)
class Answer:
    """A held-out completion. `prompt` is the last message; `score` is None where the scorer gave none, and why.

    `gold` is the gold scorer's, None without one.
    """

    prompt_id: str
    prompt: str
    text: str
    score: float | None
    reason: str
    gold: float | None = None


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
    of round r by how many versions older their sampler was than the policy that the round began with. `decisions[r]`
    are those of the guard after round r.

    `comparison` is what the recipe `evaluate` has found, once it is finished. Its answers are `after` those of the
    policy and `before` those of the first opponent, unless a judge has seen both at once.
    """

    path: Path
    config: RunConfig
    baseline: AnyEvaluation | None
    reports: tuple[RoundReport, ...]
    before: tuple[Answer, ...]
    after: tuple[Answer, ...]
    lags: Mapping[int, Mapping[int, int]]
    incidents: tuple[Incident, ...]
    decisions: Mapping[int, tuple[Decision, ...]] = field(default_factory=dict)
    comparison: Comparison | None = None

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
        run, best = str(self.path), ["--version", "best"] if self.config.choice else []
        if isinstance(self.config, EvaluateConfig):
            return _after_evaluation(run, self.comparison)
        lines = {
            "resume": ["raylign", "resume", run],
            "report": ["raylign", "review", "show", run],
            "compare": ["raylign", "compare", run, "OTHER_RUN"],
            "promote": ["raylign", "promote", run, *best],
            "export": ["raylign", "export", run, *best, "--to", "exported"],
        }
        left_out = {"resume"} if len(self.reports) == self.config.rounds else set()
        left_out |= {"promote"} if isinstance(self.config, RewardModelConfig) else set()
        left_out |= set() if self.reports else {"compare", "promote", "export"}
        return {name: shlex.join(words) for name, words in lines.items() if name not in left_out}


def read_run(directory: RunDirectory) -> RunRecord:
    """What is there so far. Raises RaylignError when a file of it cannot be read."""
    try:
        baseline = directory.baseline()
    except RaylignError:
        if directory.reports():
            raise
        baseline = None
    reports = tuple(directory.reports())
    config = directory.config()
    comparison = _comparison(directory, config)
    before, after = _both_answers(directory, config, reports)
    return RunRecord(
        directory.path,
        config,
        baseline,
        reports,
        before,
        after,
        {report.index: lags for report in reports if (lags := _lags(directory.round(report.index), report.index))},
        tuple(_incidents(directory.path / JOURNAL_NAME)),
        {report.index: made for report in reports if (made := directory.decisions(report.index))},
        comparison,
    )


def _comparison(directory: RunDirectory, config: RunConfig) -> Comparison | None:
    path = directory.path / REPORT_NAME
    return read_record(path, _COMPARISON) if isinstance(config, EvaluateConfig) and path.is_file() else None


def _both_answers(
    directory: RunDirectory, config: RunConfig, reports: Sequence[RoundReport]
) -> tuple[tuple[Answer, ...], tuple[Answer, ...]]:
    """What is held against each other: those before training, and the newest."""
    first = directory.round(0)
    if not isinstance(config, EvaluateConfig):
        newest = _answers(directory.round(reports[-1].index) / _SAMPLES) if reports else ()
        return _answers(first / _SAMPLES), newest
    if config.scoring.compares:
        return (), ()
    return _answers(first / _OF_OPPONENT), _answers(first / _OF_POLICY)


def _after_evaluation(run: str, found: Comparison | None) -> dict[str, str]:
    if found is None:
        return {"resume": shlex.join(["raylign", "resume", run])}
    lines = {"report": shlex.join(["raylign", "review", "show", run])}
    if (policy := OF_A_RUN.fullmatch(found.policy)) is not None:
        number, of = policy.groups()
        lines["promote"] = shlex.join(["raylign", "promote", of, "--version", number, "--evaluation", run])
    return lines


def about(config: Mapping[str, Any]) -> dict[str, str]:
    """What a run is of, from its settings as a tree: names to look for in a list of runs."""
    scoring = config.get("scoring") or {}
    rows = (config.get("prompts") or config.get("data") or {}).get("source")
    policy = config.get("policy") or {}
    found = {
        "recipe": config.get("recipe"),
        "model": policy.get("run") or policy.get("path") or config.get("model", {}).get("path"),
        "rows": rows,
        "loss": config.get("loss", {}).get("loss_type"),
        "scorer": scoring.get("function") or scoring.get("model") or scoring.get("path") or scoring.get("type"),
    }
    return {name: str(value) for name, value in found.items() if value}


def _answers(path: Path) -> tuple[Answer, ...]:
    if not path.is_file():
        return ()
    return tuple(
        Answer(
            row["prompt_id"],
            _last_message(row["messages"]),
            row["text"],
            row["score"],
            row["score_reason"],
            _gold(row["score_parts"]),
        )
        for row in _table(path, _ANSWER_COLUMNS)
    )


def _gold(parts: str) -> float | None:
    try:
        found = json.loads(parts).get(GOLD)
    except (ValueError, TypeError, AttributeError):
        return None
    return float(found) if isinstance(found, int | float) else None


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
