"""What recipes call to put a run on record."""

import hashlib
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from raylign.boundary.secrets import without_secrets
from raylign.config import RunConfig
from raylign.config.blocks import TrackingBlock
from raylign.records import AnyEvaluation, RoundReport
from raylign.report.measures import measured
from raylign.run.files import inside
from raylign.tracking.facts import publishable
from raylign.tracking.feed import MlflowFeed, tracing
from raylign.tracking.journal import JOURNAL_NAME, Journal, read_events
from raylign.tracking.uri import default_uri

Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]
"""MLflow's own; SCHEDULED is a run that waits for answers of people."""
_TEXT = TypeAdapter(str)
ArtifactKind = Literal["preferences", "samples", "config", "report"]


def open_tracker(run_dir: Path, block: TrackingBlock) -> "Tracker":
    """Open (or continue) the journal of `run_dir` and start feeding MLflow from it."""
    uri = default_uri(block, run_dir)
    journal = Journal(run_dir / JOURNAL_NAME)
    return Tracker(journal, MlflowFeed(run_dir, uri, block.experiment))


class Tracker:
    """Writes a run's events. Every method returns once the event is on disk and never waits for MLflow."""

    def __init__(self, journal: Journal, feed: MlflowFeed) -> None:
        self._journal = journal
        self._feed = feed
        self._run_dir = journal.path.parent

    def run_started(self, config: RunConfig, facts: Mapping[str, str]) -> None:
        """Call first in every process of a run, resumed ones too. `facts` come from `run_facts`."""
        earlier = next((event for event in read_events(self._journal.path) if event.name == "campaign_started"), None)
        campaign = uuid.uuid4().hex if earlier is None else earlier.get("campaign", _TEXT)
        params = publishable(config.model_dump(mode="json"))
        tags = publishable(facts)
        traces = tracing(config.tracking, config.scored_parts)
        body = {"campaign": campaign, "name": config.run.name, "params": params, "tags": tags}
        self._journal.append("campaign_started", {**body, "traces": traces and traces.model_dump(mode="json")})

    def prompts(self, source: str, split: str, digest: str, counts: Mapping[str, int]) -> None:
        """The prompt data set: `source` as in the config, a hex digest of its rows, rows per use."""
        source_type, where = _prompt_source(source, split)
        self._journal.append(
            "prompts", {"source_type": source_type, "source": where, "digest": digest, "counts": dict(counts)}
        )

    def baseline(self, evaluation: AnyEvaluation) -> None:
        """The evaluation before round 1; becomes round 0 of the run's curves."""
        payload = {"round": 0, "evaluation": measured(evaluation), "capability": dict(evaluation.capability)}
        self._journal.append("evaluation", payload)

    def round_started(self, index: int) -> None:
        """Call at every attempt at round `index` (from 1); in MLflow they share one run, which has everything once."""
        self._journal.append("round_started", {"round": index})

    def step(self, index: int, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of optimizer step `step` of round `index`, under TRL's names."""
        self._journal.append("step", {"round": index, "step": step, "metrics": dict(metrics)})

    def stage(self, index: int, name: str, seconds: float) -> None:
        """A stage of round `index` is done; `seconds` is wall time."""
        self._journal.append("stage", {"round": index, "name": name, "seconds": seconds})

    def round_finished(self, report: RoundReport) -> None:
        """Round `report.index` is done. The run's curves get the means over its steps."""
        self._journal.append(
            "round_finished",
            {
                "round": report.index,
                "policy_version": report.policy_version,
                "counts": dict(report.counts),
                "train": {**step_means(report.steps), **report.health},
                "sync": dict(report.sync),
                "evaluation": measured(report.evaluation),
                "capability": dict(report.evaluation.capability),
                "seconds": dict(report.seconds),
                "scoring": dict(report.scoring),
            },
        )

    def guard(self, index: int, decisions: Sequence[str]) -> None:
        """What the guard did after round `index`, in words."""
        self._journal.append("guard", {"round": index, "decisions": list(decisions)})

    def incident(self, role: str, happened: Literal["lost", "recovered"], detail: Mapping[str, Any]) -> None:
        """An actor of `role` was lost or replaced; `detail` says which, why and how long it took."""
        self._journal.append("incident", {"role": role, "happened": happened, **detail})

    def system(self, host: Mapping[str, float]) -> None:
        """How busy the driver's host is, under MLflow's names of system metrics."""
        self._journal.append("system", {"host": dict(host)})

    def artifact(self, path: Path, kind: ArtifactKind, index: int = 0) -> None:
        """A finished file inside the run directory, of round `index` (0: of the whole run).

        Raises RaylignError when `path` (as this process sees it) lies outside the run directory.
        """
        file = inside(self._run_dir, str(path.resolve()))
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        relative = file.relative_to(self._run_dir.resolve()).as_posix()
        self._journal.append("artifact", {"round": index, "path": relative, "kind": kind, "sha256": sha256})

    def close(self, status: Status, timeout_s: float = 30.0) -> int:
        """Record the end and wait at most `timeout_s` for MLflow; returns how many events it still misses.

        Raises what stopped the feed if that was not MLflow; the journal is complete either way.
        """
        self._journal.append("campaign_finished", {"status": status})
        self._journal.close()
        return self._feed.close(timeout_s)


def step_means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over steps of each metric's finite values, and `non_finite`, how many were not, when any."""
    means: dict[str, float] = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        values = [step[name] for step in steps if name in step and math.isfinite(step[name])]
        if values:
            means[name] = math.fsum(values) / len(values)
    non_finite = sum(not math.isfinite(value) for step in steps for value in step.values())
    return {**means, "non_finite": non_finite} if non_finite else means


def _prompt_source(source: str, split: str) -> tuple[str, dict[str, Any]]:
    """MLflow's source type and its description of the source."""
    if source.startswith("embedded:"):
        return "code", {"tags": {"raylign.source": source}}
    path = Path(source)
    if path.exists():
        return "local", {"uri": str(path.resolve())}
    return "hugging_face", {"path": without_secrets(source), "split": split}
