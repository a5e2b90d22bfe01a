"""Ctrl-C and SIGTERM at any moment: a prompt, clean end that leaves only the run directory."""

import signal
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from raylign.run.directory import open_run
from raylign.tracking.journal import read_events
from recipes.commands.signals import INTERRUPTED, STOPPED
from tests.faults import record
from tests.integration.tiny import (
    LONG_SAMPLING,
    LONG_TRAINING,
    SMALLEST,
    SPREAD_SCORES,
    START_S,
    Watched,
    command_line,
    script,
    synced_record,
    wait_until,
    weight_folders,
)
from tests.mlflow_servers import put_database

pytestmark = [
    pytest.mark.slow,
    pytest.mark.fault,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("interruptible"),
]

END_S = 200.0
"""Longest end; 15 s on two idle cores."""


@pytest.mark.parametrize(
    ("number", "command", "settings", "line", "stages"),
    [
        pytest.param(signal.SIGINT, script, (), "starting; actor logs are in", [], id="ctrl-c-while-actors-load"),
        pytest.param(
            signal.SIGINT,
            command_line,
            LONG_SAMPLING,
            "round 0: held-out score",
            [],
            id="ctrl-c-while-sampling",
            marks=pytest.mark.long_fault,
        ),
        pytest.param(
            signal.SIGTERM,
            script,
            LONG_TRAINING,
            "round 1 reference ",
            ["sample", "score", "prefer", "reference"],
            id="sigterm-while-training",
        ),
    ],
)
def test_a_signal_ends_the_run_and_leaves_only_its_directory(
    number: signal.Signals,
    command: Callable[..., list[str]],
    settings: Sequence[str],
    line: str,
    stages: list[str],
    served_llama: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "spread.py").write_text(SPREAD_SCORES)
    put_database(tmp_path / "runs/mlflow.db")
    model = (f"model.path={served_llama}", "scoring.function=spread:score")
    name = f"stop-{uuid.uuid4().hex[:12]}"
    with Watched(command(*SMALLEST, *model, *settings, "run.dir=runs", f"run.name={name}"), tmp_path) as run:
        run.wait_for(line)
        wait_until(lambda: _in_the_midst(run, name, settings), START_S, lambda: run.output)
        sent = time.monotonic()
        run.send(number, to_group=True)
        status, segments = run.finish(END_S)
        ended = time.monotonic() - sent
        assert status == (INTERRUPTED if number == signal.SIGINT else STOPPED), run.output
        wait_until(lambda: not run.processes(), END_S, lambda: f"processes are left: {run.processes()}")
        assert [path for path in segments if path.exists()] == []
        assert weight_folders(name) == []
        assert "Traceback" not in run.output
    directory = open_run(tmp_path / "runs" / name)
    assert directory.config().run.name == name
    assert directory.reports() == []
    events = list(read_events(directory.path / "events.jsonl"))
    assert [event.payload["name"] for event in events if event.name == "stage"] == stages
    assert events[-1].name == "campaign_finished"
    assert synced_record(directory.path).info.status == "KILLED"
    steps = sum(event.name == "step" for event in events)
    newest = directory.checkpoint_store(keep=1).newest()
    # The signal may come between a step and its report.
    assert newest is None if steps == 0 else newest and len(newest.steps) in (steps, steps + 1)
    record(
        f"{number.name}, {line}...",
        "the signal",
        recovered_s=ended,
        lost="nothing: stages and steps so far are saved, no process or shared memory is left",
    )


def _in_the_midst(run: Watched, name: str, settings: Sequence[str]) -> bool:
    """Ray and the folder for weights are there, and of a long training the first steps."""
    there = any("gcs_server" in line for line in run.processes().values()) and weight_folders(name)
    if settings != LONG_TRAINING:
        return bool(there)
    journal = run.folder / "runs" / name / "events.jsonl"
    return bool(there) and any(event.name == "step" for event in read_events(journal))


@pytest.mark.long_fault
def test_a_second_ctrl_c_ends_at_once(served_llama: str, tmp_path: Path) -> None:
    name = f"stop-{uuid.uuid4().hex[:12]}"
    settings = (*SMALLEST, f"model.path={served_llama}", *LONG_SAMPLING, "run.dir=runs", f"run.name={name}")
    with Watched(script(*settings), tmp_path) as run:
        run.wait_for("round 0: held-out score")
        run.send(signal.SIGINT, to_group=False)
        run.wait_for("stopping on SIGINT; once more Ctrl-C ends without saving")
        sent = time.monotonic()
        run.send(signal.SIGINT, to_group=False)
        status, _ = run.finish(END_S)
        assert status == INTERRUPTED, run.output
        wait_until(lambda: not run.processes(), END_S, lambda: f"processes are left: {run.processes()}")
        ended = time.monotonic() - sent
        assert weight_folders(name) == []
    record(
        "second Ctrl-C",
        "SIGINT twice",
        recovered_s=ended,
        lost="the steps since the last checkpoint; no process or shared memory is left",
    )
