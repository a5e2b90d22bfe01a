"""Whatever went wrong, the user reads what happened and the cure, and finds the rest in a file."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RaySystemError

from raylign.config.blocks import RunBlock
from raylign.errors import ConfigError, PlacementError, RaylignError, TrainerError
from recipes.commands.cli import ended_cleanly
from recipes.commands.failures import as_script, explained, told

SECRET = "hf_abcdefghijklmnop"


def chained(error: RaylignError, cause: Exception) -> RaylignError:
    error.__cause__ = cause
    return error


def cured(error: RaylignError, cure: str) -> RaylignError:
    error.cure = cure
    return error


def shown(error: Exception, run: RunBlock, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines on stderr of a command that ends with status 1."""
    with pytest.raises(typer.Exit) as ended, ended_cleanly(), told(run):
        raise error
    out, err = capsys.readouterr()
    assert ended.value.exit_code == 1 and out == ""
    return err.splitlines()


@pytest.fixture
def run(tmp_path: Path) -> RunBlock:
    (tmp_path / "demo").mkdir()
    return RunBlock(dir=tmp_path, name="demo")


def engine_dead() -> Exception:
    from vllm.v1.engine.exceptions import EngineDeadError  # noqa: PLC0415 - vLLM takes seconds

    return EngineDeadError()


RAW = [
    lambda: OutOfMemoryError("killed\n" * 50),
    lambda: RaySystemError("raylet\nis\ngone"),
    pytest.param(engine_dead, id="EngineDeadError"),
    lambda: torch.OutOfMemoryError("CUDA out of memory"),
    lambda: RuntimeError("Error building extension 'cpu_adam'\n" * 20),
    lambda: KeyError("x"),
    lambda: AssertionError(),
    lambda: chained(TrainerError("an optimizer step: KeyError: 'x'"), RayActorError(error_msg="long\n" * 30)),
    lambda: chained(cured(TrainerError("trainers is lost"), "lower it"), OutOfMemoryError("killed\n" * 50)),
]


@pytest.mark.parametrize("make", RAW, ids=lambda make: type(make()).__name__)
def test_two_lines_and_a_file(make: Callable[[], Exception], run: RunBlock, capsys: pytest.CaptureFixture[str]) -> None:
    error = make()
    first, second = shown(error, run, capsys)
    assert first.startswith("error: ") and (type(error).__name__ in first or str(error) in first)
    assert len(first) < 400
    path = Path(re.search(r"the rest is in (.*)$", second)[1])  # type: ignore[index]
    assert path.parent == run.dir / "demo" and path.name.startswith("error-") and path.stat().st_mode & 0o077 == 0
    text = path.read_text()
    assert "Traceback (most recent call last)" in text and str(error.__cause__ or error) in text
    if not isinstance(error, RaylignError) or error.cure:
        assert second.startswith("cure: ")


def test_the_cure_of_a_lack_of_memory_names_the_settings(run: RunBlock, capsys: pytest.CaptureFixture[str]) -> None:
    _, second = shown(torch.OutOfMemoryError("CUDA out of memory"), run, capsys)
    assert second.startswith("cure: lower trainer.ranks or generators.count; the rest is in ")


def test_our_own_errors_stay_as_they_are(run: RunBlock, capsys: pytest.CaptureFixture[str]) -> None:
    cause = FileNotFoundError(2, "No such file")
    assert shown(chained(ConfigError("lower it\n  row 3"), cause), run, capsys) == ["error: lower it", "  row 3"]
    late = chained(PlacementError("not ready within 3 s"), GetTimeoutError("Get timed out"))
    assert shown(late, run, capsys) == ["error: not ready within 3 s"]
    assert shown(cured(ConfigError("too large"), "lower it"), run, capsys) == ["error: too large", "cure: lower it"]
    assert not list((run.dir / "demo").iterdir())


def test_without_a_run_directory_the_file_lies_beside_where_it_would_be(
    run: RunBlock, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.dir / "demo").rmdir()
    _, second = shown(RaySystemError("gone"), run, capsys)
    (path,) = run.dir.iterdir()
    assert path.name.startswith("demo-error-") and str(path) in second


def test_outside_of_a_run_it_goes_to_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(typer.Exit), ended_cleanly():
        raise KeyError("x")
    (path,) = tmp_path.iterdir()
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: KeyError: 'x'" and second.endswith(f"the rest is in {path}")


def test_no_secret_reaches_the_file(run: RunBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("RUN_KEY", "ab")
    with pytest.raises(RaySystemError), told(run):
        error = RaySystemError(f"401 for {SECRET} at https://me:{SECRET}@host/x and postgres://u:pw@db \x1b[2J")
        error.add_note(f"The end of worker.err:\ntoken={SECRET}")
        raise error
    (path,) = (run.dir / "demo").iterdir()
    text = path.read_text()
    assert SECRET not in text and "u:pw@" not in text and "\x1b" not in text
    assert "token=[redacted]" in text and "The end of worker.err" in text and "https://host/x" in text


def test_an_error_keeps_its_type_for_whoever_calls_a_recipe(run: RunBlock) -> None:
    error = chained(TrainerError("lost"), RaySystemError("gone"))
    with pytest.raises(TrainerError) as caught, told(run):
        raise error
    assert caught.value is error and error.rest is not None
    assert explained(error).rest == error.rest, "it is written once"
    with pytest.raises(KeyError), told(run):
        raise KeyError("x")


def test_a_file_that_cannot_be_written_is_no_second_error(
    run: RunBlock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "recipes.commands.failures.os.open", lambda *arguments: (_ for _ in ()).throw(OSError(28, "full"))
    )
    lines = shown(KeyError("x"), run, capsys)
    assert lines[-2] == "error: KeyError: 'x'" and lines[-1].startswith("cure: ") and "the rest" not in lines[-1]


def test_a_script_ends_as_the_command_does(run: RunBlock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, as_script():
        raise ConfigError("lower it")
    assert ended.value.code == 1 and capsys.readouterr().err == "error: lower it\n"


@pytest.mark.parametrize("end", [typer.Exit(3), typer.Abort(), typer.BadParameter("no"), SystemExit(7)])
def test_other_ends_pass(end: BaseException) -> None:
    with pytest.raises(type(end)) as caught, ended_cleanly():
        raise end
    assert caught.value is end
