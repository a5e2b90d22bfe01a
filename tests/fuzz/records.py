"""Files of a run directory, read as `raylign resume` and `raylign export` read them."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from hypothesis import strategies as st

from actors.trainer.state import STATE_NAME, read_state
from raylign.records import Score
from raylign.run.directory import RunDirectory, open_run
from raylign.run.inputs import INPUTS_NAME, Input, accept, keep, require_same
from raylign.run.rounds import finished_stages
from raylign.run.sampled import read_sampled
from raylign.run.tables import read_candidates, read_preferences
from raylign.scoring.cache import ScoreCache, score_key
from raylign.tracking.feed import FeedState, TraceFile, Tracing, load_state
from raylign.tracking.journal import read_events
from raylign.tracking.trace_rows import read_traces
from recipes.commands.resume import resumed_config
from tests.fuzz.guard import folder_until_exit
from tests.fuzz.mutations import as_json, changed, edited
from tests.unit.run.test_resume import PROMPTS, config_in, run_once

FILES = (
    "config.yaml",
    "events.jsonl",
    "rounds/0000/report.json",
    "rounds/0001/report.json",
    "rounds/0001/guard.json",
    "rounds/0001/stages.json",
    "rounds/0001/sampled.jsonl",
    "rounds/0001/candidates.parquet",
    "rounds/0001/preferences.parquet",
    "checkpoints/0002/manifest.json",
    "checkpoints/0002/progress.json",
    "inputs.json",
)

RULE = {"measure": "score", "above": 0.5, "action": "raise_beta"}


@cache
def finished_run() -> Path:
    """The run directory of two rounds with roles that are fakes."""
    parent = folder_until_exit()
    run_once(config_in(parent, guard=[RULE]), parent)
    (found,) = (path.parent for path in parent.glob("runs/*/config.yaml"))
    if not (found / INPUTS_NAME).exists():
        keep(found, {"prompts.source": Input("0" * 64, "rows of prompts", True)})
    return found


def inputs(name: str) -> Callable[[], st.SearchStrategy[bytes]]:
    def make() -> st.SearchStrategy[bytes]:
        content = (finished_run() / name).read_bytes()
        if not name.endswith((".json", ".jsonl")):
            return edited([content])
        lines = content.splitlines() if name.endswith("l") else [content]
        trees = changed([json.loads(line) for line in lines]).map(as_json)
        return st.one_of(edited([content]), trees, trees.map(lambda tree: tree + b"\n" + lines[-1] + b"\n"))

    return make


def valid(name: str) -> Callable[[], bytes]:
    return lambda: (finished_run() / name).read_bytes()


def reader(name: str, folder: Callable[[], Path]) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        place = folder() / "run"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(finished_run(), place)
        (place / name).write_bytes(data)
        _read_all(place)

    return read


def _read_all(place: Path) -> None:
    resumed_config(place, ())
    require_same(place, PROMPTS, {})
    accept(place, ())
    directory: RunDirectory = open_run(place)
    directory.reports()
    directory.decisions(1)
    for index in (1, 2):
        finished_stages(directory.round(index))
    directory.checkpoint_store(None).newest()
    for _ in read_events(place / "events.jsonl"):
        pass
    for _ in read_sampled(directory.round(1) / "sampled.jsonl"):
        pass
    if directory.rounds_finished():
        directory.baseline()
    candidates, _ = read_candidates(directory.round(1) / "candidates.parquet")
    read_preferences(directory.round(1) / "preferences.parquet", PROMPTS.train, candidates)


def rows(table: str) -> list[dict[str, Any]]:
    """Of a table of round 1."""
    found: list[dict[str, Any]] = pq.read_table(finished_run() / "rounds/0001" / table).to_pylist()
    return found


def traces(table: str, folder: Callable[[], Path]) -> Callable[[bytes], None]:
    """The table as what MLflow shows of it."""
    state = FeedState(campaign="c" * 32, run_id="r", experiment_id="1", tracing=Tracing(preferences=1))

    def read(data: bytes) -> None:
        place = folder() / "traced"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(finished_run() / "rounds/0001", place)
        (place / table).write_bytes(data)
        file = TraceFile(kind=table.removesuffix(".parquet"), path=table, round=1, time_ms=0)
        for _ in read_traces(place / table, file, state):
            pass

    return read


def mlflow_state(folder: Callable[[], Path]) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        (folder() / "mlflow.json").write_bytes(data)
        load_state(folder(), "sqlite:///x")

    return read


MLFLOW_STATE = json.dumps(
    {"stores": {"sqlite:///x": {"sequence": 3, "run_id": "r", "rounds": {"1": {"run_id": "s", "steps": 2}}}}}
).encode()


@cache
def kept_scores() -> bytes:
    """A file of `ScoreCache` with a score."""
    path = folder_until_exit() / "scores.sqlite"
    kept = ScoreCache(path)
    kept.put({score_key("a"): Score(0.5, {"a": 1.0}, "why")})
    return path.read_bytes()


def scores(folder: Callable[[], Path]) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        place = folder() / "scores"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "scores.sqlite").write_bytes(data)
        ScoreCache(place / "scores.sqlite").get([score_key("a")])

    return read


TRAINER = json.dumps(
    {"steps_done": 3, "followed": 1, "loss": {"kl": 0.5}, "warm_at": 1.0, "loss_scaler": {"scale": 2.0}}
).encode()


def trainer(folder: Callable[[], Path]) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        (folder() / STATE_NAME).write_bytes(data)
        read_state(folder())

    return read


VALUES: tuple[object, ...] = (
    0.5,
    None,
    "a",
    "nan",
    b"x",
    1e999,
    -1,
    2**63 - 1,
    '{"a": 1}',
    "[]",
    '{"a": "b"}',
    "[" * 9999,
)


def tables() -> st.SearchStrategy[bytes]:
    """Files with a table of scores that holds whatever SQLite takes."""
    columns = st.lists(st.sampled_from(("key", "value", "parts", "more")), min_size=1, max_size=4, unique=True)
    cells = st.lists(st.sampled_from(VALUES), min_size=4, max_size=4)
    return st.tuples(columns, cells).map(lambda drawn: _table(*drawn))


@cache
def _made() -> Path:
    return folder_until_exit()


def _table(columns: list[str], cells: list[object]) -> bytes:
    path = _made() / "scores.sqlite"
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"CREATE TABLE scores ({', '.join(columns)})")
        row = [score_key("a") if name == "key" else cell for name, cell in zip(columns, cells, strict=False)]
        connection.execute(f"INSERT INTO scores VALUES ({', '.join('?' * len(columns))})", row)
        connection.execute("CREATE TABLE reasons (key, reason)")
        connection.execute("INSERT INTO reasons VALUES (?, ?)", [score_key("a"), cells[-1]])
    return path.read_bytes()
