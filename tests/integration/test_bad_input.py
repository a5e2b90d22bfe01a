"""Wrong input through the real command: a clear error before anything starts, or an unscored item and no lost work."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from typer.testing import CliRunner

from recipes.cli import app
from tests.integration.tiny import RECIPE, ROOT

PROMPTS = [{"prompt": f"Write about film number {number}."} for number in range(8)]


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray would put its files if a cluster were started; its socket paths may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        yield Path(folder)


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
    assert tree(files) == before
    assert tree(ray_folder) == set(), "a Ray cluster was started"


def test_a_missing_recipe_is_named(files: Path, ray_folder: Path) -> None:
    assert "absent.yaml: cannot read the recipe (No such file or directory)" in refused(recipe="absent.yaml")


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("placement.cpus_per_actor=64", ["the roles need 64 CPU (available", "lower placement.cpus_per_actor"]),
        ("run.dir=empty.jsonl", ["empty.jsonl", "cannot be written", "run.dir"]),
        ("run.name=finished", ["runs/finished exists already", "run.name="]),
    ],
)
def test_what_only_the_cluster_can_tell_leaves_no_run(
    setting: str, parts: list[str], files: Path, ray_folder: Path
) -> None:
    before = tree(files)
    message = refused(setting)
    assert [part for part in parts if part not in message] == [], message
    assert tree(files) == before
    assert not ray.is_initialized()


def test_a_dead_cluster_is_refused_at_once(files: Path, ray_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    before = tree(files)
    assert "RAY_ADDRESS=127.0.0.1:1: no connection" in refused()
    assert tree(files) == before
