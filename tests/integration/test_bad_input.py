"""Wrong input through the real command: a clear error before anything starts, or an unscored item and no lost work."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from typer.testing import CliRunner

from raylign.report.tables import sampled
from raylign.run.directory import open_run
from recipes.commands.cli import app
from tests.faults import record
from tests.integration.tiny import RECIPE, ROOT, SMALLEST, campaign_record
from tests.mlflow_servers import put_database

SCORER = """\
import pathlib, time, zlib

REPORT = pathlib.Path("FOLDER/runs/careless/rounds/0001/report.json")


def score(prompts, completions):
    asked = prompts[0][-1]["content"]
    if REPORT.exists():
        raise ConnectionError("the judge is gone")
    if "raises" in asked:
        raise ValueError("cannot judge this")
    if "hangs" in asked:
        time.sleep(3600)
    scores = [zlib.crc32(completion.encode()) / 2**32 for completion in completions]
    if "short" in asked:
        return scores[:-1]
    if "nan" in asked:
        scores[0] = float("nan")
    return scores
"""
CASES = ("raises", "hangs", "short", "nan", "plain", "simple")
PROMPTS = [{"prompt": f"Write about film number {number}."} for number in range(8)]


pytestmark = pytest.mark.usefixtures("no_cluster")


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray would put its files if a cluster were started; its socket paths may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        yield Path(folder)


@pytest.fixture
def careless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a scorer that fails by prompt, and prompts for it: six to train on, two held out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "careless.py").write_text(SCORER.replace("FOLDER", str(tmp_path)))
    splits = {
        "train": [{"prompt": f"Write about a film that is {case}."} for case in CASES],
        "test": [{"prompt": f"Write about a play that is {case}."} for case in ("nan", "plain")],
    }
    (tmp_path / "prompts.json").write_text(json.dumps(splits))
    return tmp_path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with prompt files, good and bad, and a finished run."""
    monkeypatch.chdir(tmp_path)
    long = {"prompt": "word " * 3000}
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps(row) for row in [*PROMPTS, long]))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "good"}\n{"prompt": "cut o')
    (tmp_path / "runs/finished").mkdir(parents=True)
    (tmp_path / "runs/finished/config.yaml").write_text("run: {name: finished}\n")
    return tmp_path


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refused(*settings: str, recipe: str = str(ROOT / RECIPE)) -> str:
    """What `raylign run` says on stderr when it refuses, which it must do with status 1 and one message."""
    result = CliRunner().invoke(app, ["run", recipe, "run.dir=runs", *settings])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output
    return result.stderr


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("samplin.max_new_tokens=5", ["samplin: unknown key", "did you mean 'sampling'?"]),
        ("sampling.max_tokens=5", ["sampling.max_tokens: unknown key", "did you mean 'max_new_tokens'?"]),
        ("sampling.num_generations=1", ["sampling.num_generations", "greater than or equal to 2", "got 1"]),
        ("sampling.max_new_tokens=512", ["leaves no room for a prompt", "generators.max_model_len=512"]),
        ("schedule.prompts_per_round=100000", ["schedule.prompts_per_round=100000", "training prompts", "lower it"]),
        ("prompts.source=missing.jsonl", ["missing.jsonl", "no such file", "prompts.source"]),
        ("prompts.source=empty.jsonl", ["empty.jsonl", "no rows", "at least two prompts"]),
        ("prompts.source=torn.jsonl", ["torn.jsonl", "1 of 2 rows", "line 2"]),
        ("prompts.source=long.jsonl", ["1 of 9 rows", "line 9: 30", "limit 464", "generators.max_model_len"]),
        ("model.path=./no-such-model", ["no-such-model", "no such folder", "correct model.path"]),
        ("model.path=embedded:smolm2-135m", ["did you mean embedded:smollm2-135m?"]),
        ("model.path=no-such-org-8391/no-such-model", ["no-such-org-8391/no-such-model"]),
        ("generators.max_model_len=100000", ["generators.max_model_len=100000", "8192 positions", "lower it"]),
        ("scoring.function=raylign.scoring.vader:compond", ["has no 'compond'", "did you mean 'compound'?"]),
        ("scoring.function=no_such_module:score", ["no module 'no_such_module'"]),
        ("tracking.uri=./mlruns", ["tracking.uri='./mlruns'", "sqlite:///"]),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(
    setting: str, parts: list[str], files: Path, ray_folder: Path
) -> None:
    before = tree(files)
    message = refused(setting)
    assert [part for part in parts if part not in message] == [], message
    listed = files / "runs/sentiment-smollm2.quarantine.jsonl"
    assert tree(files) - {listed} == before
    assert listed.exists() == (f"every bad row is in {listed}" in message) == ("rows cannot be used" in message)
    assert tree(ray_folder) == set(), "a Ray cluster was started"


def test_a_missing_recipe_is_named(files: Path, ray_folder: Path) -> None:
    assert "absent.yaml: cannot read the recipe (No such file or directory)" in refused(recipe="absent.yaml")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("placement.generator_cpus=64", ["the roles need 64 CPU (available", "lower placement.generator_cpus"]),
        ("run.dir=empty.jsonl", ["empty.jsonl", "cannot be written", "run.dir"]),
        ("run.dir=/proc/raylign", ["/proc/raylign", "cannot be written", "run.dir"]),
        ("run.name=finished", ["runs/finished exists already", "run.name="]),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(setting: str, parts: list[str], files: Path, ray_folder: Path) -> None:
    before = tree(files)
    message = refused(setting)
    assert [part for part in parts if part not in message] == [], message
    assert tree(files) == before
    assert not ray.is_initialized()
    only_the_cluster_can_tell = setting.startswith("placement.")
    assert (tree(ray_folder) != set()) == only_the_cluster_can_tell, "whether a Ray cluster was started"
    record(
        f"refused: {parts[0].split(' (')[0]}",
        setting,
        lost="nothing: refused before any actor starts, no run directory",
    )


def test_a_dead_cluster_is_refused_at_once(files: Path, ray_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    before = tree(files)
    assert "RAY_ADDRESS=127.0.0.1:1: no connection" in refused()
    assert tree(files) == before


@pytest.mark.slow
@pytest.mark.usefixtures("lent")
def test_a_careless_scorer_costs_items_and_a_dead_one_stops_the_run(careless: Path, served_llama: str) -> None:
    """Round 1 goes on with what was scored; in round 2 nothing is, and only that round is lost."""
    put_database(careless / "runs/mlflow.db")
    settings = (
        *(setting for setting in SMALLEST if not setting.startswith("model.dtype=")),
        *("run.dir=runs", "run.name=careless", "prompts.source=prompts.json"),
        *("model.dtype=bfloat16", "schedule.rounds=2"),
        *("schedule.prompts_per_round=6", "scoring.function=careless:score", "scoring.batch_size=3"),
        *("scoring.timeout_s=2", "scoring.max_unscored=0.6", f"model.path={served_llama}"),
    )
    result = CliRunner().invoke(app, ["run", str(ROOT / RECIPE), *settings])
    output = result.output
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), output
    assert "Traceback" not in output
    directory = open_run(careless / "runs/careless")
    (report,) = directory.reports()
    counts = report.counts
    assert {name: counts[name] for name in ("prompts", "candidates", "unscored", "unscored_groups")} == {
        "prompts": 6,
        "candidates": 18,
        "unscored": 3 + 3 + 3 + 1,
        "unscored_groups": 3,
    }
    assert counts["preferences"] == 3
    assert (sampled(report.evaluation).completions, sampled(report.evaluation).unscored) == (2, 1)
    assert reasons(directory.round(1) / "candidates.parquet") == {
        "raises": ["ValueError: cannot judge this"] * 3,
        "hangs": ["no answer within 2 s"] * 3,
        "short": ["returned 0 scores for 1 completions"] * 3,
        "nan": ["", "", "returned nan"],
        "plain": [""] * 3,
        "simple": [""] * 3,
    }
    assert directory.checkpoint(1).is_dir()
    error = result.stderr[result.stderr.index("error: ") :]
    for part in ("18 of 18", "60%", "ConnectionError: the judge is gone"):
        assert part in error
    kept = pq.read_table(directory.round(2) / "candidates.parquet").to_pylist()
    assert len(kept) == 18
    assert all(row["text"] and row["score"] is None and row["score_reason"] for row in kept)
    assert campaign_record(careless / "runs").info.status == "FAILED"


def reasons(candidates: Path) -> dict[str, list[str]]:
    """Sorted reasons of a round's candidates by the last word of their prompt; empty when scored."""
    found: dict[str, list[str]] = {case: [] for case in CASES}
    for row in pq.read_table(candidates).to_pylist():
        assert (row["score"] is None) == bool(row["score_reason"])
        case = json.loads(row["messages"])[-1]["content"].rstrip(".").split()[-1]
        found[case].append(row["score_reason"])
    return {case: sorted(texts) for case, texts in found.items()}
