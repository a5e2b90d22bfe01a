"""How a run looks on its page in MLflow: description, tags to filter by, figures and the report."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import RunTag
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from raylign.errors import RaylignError, TrackingError
from raylign.report.figures import Picture, pictures
from raylign.report.measures import MEASURES, Values, written
from raylign.report.page import description, report_page
from raylign.report.record import RunRecord, read_run
from raylign.report.text import inline
from raylign.report.verdict import Verdict, verdict
from raylign.run.directory import RunDirectory
from raylign.run.settings import CONFIG_NAME
from raylign.tracking.mlflow_store import MlflowStore

FIGURES, REPORT = "figures", "report.html"
AT_FIRST = {"verdict": "untrained", "status": "running"}
"""Tags that a run begins with: MLflow's pages show tags in the order in which they came, and these are read most."""
_OPTIONS = {
    "recipe": ("recipe",),
    "model": ("policy.run", "policy.path", "model.path"),
    "loss": ("loss.loss_type",),
    "scorer": ("scoring.function", "scoring.model", "scoring.path", "scoring.type"),
}
"""Tags of a run, and the options that tell them: the first that there is."""
_FACTS = {MLFLOW_GIT_COMMIT: "git.sha", MLFLOW_SOURCE_NAME: "source", MLFLOW_USER: "user"}
_SHOWN_BY_MLFLOW = frozenset({"source", "user"})
logger = logging.getLogger(__name__)


def tags_of(params: Mapping[str, str], facts: Mapping[str, str]) -> dict[str, str]:
    """What a list of runs is filtered by, where MLflow shows source, commit and user, and the other facts."""
    found = {tag: next((params[name] for name in names if name in params), "") for tag, names in _OPTIONS.items()}
    own = {tag: facts[name] for tag, name in _FACTS.items() if name in facts}
    others = {name: value for name, value in facts.items() if name not in _SHOWN_BY_MLFLOW}
    return {**{tag: value for tag, value in found.items() if value}, MLFLOW_SOURCE_TYPE: "LOCAL", **own, **others}


def round_note(index: int, name: str, values: Values | None = None) -> str:
    """The description of a round's own run; `values` are those of its evaluation once it is finished."""
    where = (
        f"Its curves are by optimizer step; those by round, the verdict and the report are on the run {inline(name)}."
    )
    if values is None:
        return f"Round {index}, not finished. {where}"
    same = values.get("kl_initial") == values.get("kl")
    known = [
        measure
        for measure in MEASURES
        if not measure.detail and values.get(measure.name) is not None and not (same and measure.name == "kl_initial")
    ]
    told = [f"{measure.title}: {written(measure, values)}" for measure in known] or [
        f"{key}: {value:.3f}" for key, value in values.items() if value is not None and "/" not in key
    ]
    return f"Round {index}, held out: {inline('; '.join(told))}. {where}"


def present(store: MlflowStore, run_id: str, run_dir: Path, status: str, *, draw: bool) -> None:
    """Say on the run's page how far it is and what came of it; `draw` the figures and the report anew.

    All of it is made of files of the run directory. One that cannot be read leaves the page as it is, with a warning.
    Raises TrackingError.
    """
    if not (run_dir / CONFIG_NAME).is_file():
        return
    try:
        record = read_run(RunDirectory(run_dir))
        found = verdict(record)
        drawn = pictures(record) if draw else ()
        report = report_page(record, found, drawn) if draw else ""
    except TrackingError:
        raise
    except RaylignError as error:
        logger.warning("%s; the run's page in MLflow stays as it is", error)
        return
    if draw:
        _send(store, run_id, drawn, report)
    note = description(record, found, status, _address(run_id, record))
    tags = {MLFLOW_RUN_NOTE: note, "status": status.lower(), **_outcome(record, found)}
    store.log_tags(run_id, [RunTag(name, value) for name, value in tags.items()])


def _outcome(record: RunRecord, found: Verdict) -> dict[str, str]:
    rounds = {"rounds": f"{len(record.reports)} of {record.config.rounds}"} if record.config.rounds else {}
    return {"verdict": found.word, **rounds}


def _address(run_id: str, record: RunRecord) -> str | None:
    """Of the first figure, as the pages of MLflow's own server ask for it."""
    name = "win_rates" if record.comparison else "score" if record.reports else None
    return name and f"get-artifact?path={FIGURES}/{name}.png&run_uuid={run_id}"


def _send(store: MlflowStore, run_id: str, drawn: tuple[Picture, ...], report: str) -> None:
    with tempfile.TemporaryDirectory(prefix="raylign-figures-") as folder:
        for picture in drawn:
            file = Path(folder) / f"{picture.name}.png"
            file.write_bytes(picture.png)
            store.log_file(run_id, file, FIGURES)
    # A lone surrogate in model output has no UTF-8 form.
    store.log_text(run_id, report.encode("utf-8", "replace").decode(), REPORT)
