"""The command line, as a person types it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from raylign.config import load_config, parse_config
from raylign.errors import RaylignError
from raylign.export.card import public_name
from raylign.records import Evaluation, RoundReport
from raylign.run.directory import RunDirectory, create_run
from raylign.tracking.journal import JOURNAL_NAME, Journal
from recipes.commands.cli import app, ended_cleanly
from recipes.commands.signals import terminable
from tests.unit.report.run_records import save_run
from tests.unit.tiny_policy import save_recipe

HEAVY = ("torch", "transformers", "vllm", "ray", "deepspeed", "mlflow", "datasets", "peft", "sqlalchemy")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return save_recipe(tmp_path)


def raylign(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


HELPS = [["--help"], *([name, "--help"] for name in ("plan", "run", "submit", "doctor", "sync"))]


def loaded(*commands: list[str]) -> list[str]:
    """Which heavy modules a process has loaded each time that one of these commands, run in turn, has ended well."""
    code = (
        "import sys; from typer.testing import CliRunner; from recipes.commands.cli import app\n"
        f"for arguments in {commands!r}:\n"
        "    result = CliRunner().invoke(app, arguments); assert result.exit_code == 0, result.output\n"
        f"    print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return child.stdout.splitlines()


@pytest.fixture(scope="module")
def loaded_by_helps() -> list[str]:
    return loaded(*HELPS)


@pytest.mark.parametrize("arguments", HELPS)
def test_help_loads_none_of_the_heavy_libraries(arguments: list[str], loaded_by_helps: list[str]) -> None:
    assert loaded_by_helps[HELPS.index(arguments)] == "[]"


def test_a_plan_loads_tokenizers_and_nothing_that_computes_or_runs(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the others takes seconds; what only torch knows of a new model is asked of a process beside it."""
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    assert loaded(["plan", str(recipe)]) == ["['transformers']"]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("import os; os._exit(3)")
    monkeypatch.syspath_prepend(str(broken))
    assert loaded(["plan", str(recipe)]) == ["['transformers']"], "no torch for a model seen before"
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "another"))
    with pytest.raises(subprocess.CalledProcessError) as failed:
        loaded(["plan", str(recipe)])
    assert "the process that checks the model ended with status 3" in failed.value.stderr


@pytest.mark.parametrize("command", ["run", "submit", "plan", "doctor", "export", "sync", "compare", "review show"])
def test_every_help_has_an_example(command: str) -> None:
    told = " ".join(raylign(*command.split(), "--help").output.split())
    assert f"Example: raylign {command}" in told


def test_review_show_writes_the_report_and_refuses_what_is_no_run(tmp_path: Path) -> None:
    directory = save_run(tmp_path, [0.1] * 6)
    done = raylign("review", "show", directory.path, "--to", tmp_path / "page.html")
    assert done.exit_code == 0 and "Better: held-out score" in done.output
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    refused = raylign("review", "show", tmp_path / "nothing")
    assert refused.exit_code == 1 and "no run directory" in refused.output


def test_a_misspelt_setting_gets_a_suggestion_and_no_traceback(recipe: Path) -> None:
    result = raylign("plan", recipe, "sampling.temprature=1")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {recipe}: 1 problem(s)")
    assert "did you mean 'temperature'?" in result.stderr
    assert "Traceback" not in result.output and result.stdout == ""


@pytest.mark.parametrize("words", [["--sampling.temperature", "1"], ["--sampling.temperature=1"]])
def test_a_setting_written_as_an_option_is_explained(recipe: Path, words: list[str]) -> None:
    for command in ("run", "submit", "plan"):
        result = raylign(command, recipe, *words)
        assert result.exit_code == 2
        assert "key=value: sampling.temperature=1" in " ".join(result.stderr.replace("│", " ").split())


def test_negative_values_are_settings(recipe: Path) -> None:
    result = raylign("plan", recipe, "sampling.temperature=-1")
    assert result.exit_code == 1
    assert "sampling.temperature: Input should be greater than 0 (got -1)" in result.stderr


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    result = raylign("run", tmp_path / "none.yaml")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "none.yaml: cannot read the recipe (No such file or directory)" in result.stderr


def test_a_run_stops_before_loading_anything_when_its_cluster_is_gone(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    result = raylign("run", recipe)
    assert result.exit_code == 1
    assert "error: RAY_ADDRESS=127.0.0.1:1: no connection" in result.stderr
    assert not (recipe.parent / "runs").exists()


def test_a_plan_is_printed_and_nothing_is_made(recipe: Path) -> None:
    result = raylign("plan", recipe, "schedule.rounds=3")
    assert result.exit_code == 0, result.output
    assert "at most 600 sampled tokens" in result.stdout
    assert not (recipe.parent / "runs").exists()


def test_a_plan_that_cannot_be_carried_out_exits_with_1(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    result = raylign("plan", recipe, "trainer.ranks=2")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the roles need 2 CPU (available 1)" in result.stderr


def test_the_version_is_printed() -> None:
    assert raylign("--version").stdout.startswith("raylign ")


def test_an_error_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, ended_cleanly():
        raise RaylignError("[bold]row[/bold] :smile:\n  \x1b[2Jsecond")
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "error: [bold]row[/bold] :smile:\n  \\x1b[2Jsecond\n"


def test_ctrl_c_ends_with_130(interruptible: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, ended_cleanly():
        signal.raise_signal(signal.SIGINT)
    assert ended.value.code == 130
    assert "interrupted; what is finished is saved" in capsys.readouterr().err


def test_sigterm_unwinds_and_ends_with_75() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    unwound = []
    with pytest.raises(SystemExit) as ended, ended_cleanly():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            unwound.append(True)
    assert (ended.value.code, unwound) == (75, [True]), "a second SIGTERM must not disturb the unwinding"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_other_ends_keep_their_status() -> None:
    with pytest.raises(SystemExit) as ended, terminable():
        raise SystemExit(7)
    assert ended.value.code == 7


def test_a_signal_ignored_outside_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with terminable():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_leaves_an_ignored_ctrl_c_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit), terminable():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


BEST_IS_LOWEST = ("evaluation.metric_for_best_model=score", "evaluation.greater_is_better=false")


def evaluation(score: float) -> Evaluation:
    return Evaluation(score, score - 0.1, score + 0.1, 2.0, 8.0, 0.5, 1.0, 3, 0)


def save_adapter(folder: Path, base: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(str(folder))


@pytest.fixture
def finished(recipe: Path) -> RunDirectory:
    """Two finished rounds with checkpoints 1 and 2, and a checkpoint 3 whose round has no report yet."""
    config = load_config(recipe)
    run = create_run(config.run, config)
    with Journal(run.path / JOURNAL_NAME) as journal:
        journal.append("campaign_started", {"tags": {"version.torch": "9.9.9", "python": "3.11"}})
    for version in (1, 2, 3):
        with run.checkpoint_store(None).new(version, (), True, 0) as folder:
            save_adapter(folder, recipe.parent / "policy", seed=version)
        if version < 3:
            run.write_report(RoundReport(version, version, {}, (), {}, evaluation(version / 10), {}))
    return run


def test_the_newest_finished_adapter_is_exported(finished: RunDirectory, tmp_path: Path) -> None:
    to = tmp_path / "out"
    result = raylign("export", finished.path, "--to", to)
    assert result.exit_code == 0, result.output
    weights = load_file(to / "adapter_model.safetensors")
    expected = load_file(finished.checkpoint(2) / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert json.loads((to / "adapter_config.json").read_text())["base_model_name_or_path"] == "policy"
    card = (to / "README.md").read_text()
    assert "| Rounds | 2 |" in card and "0.100 to 0.300" in card and "- torch 9.9.9" in card
    assert "`prompts.jsonl`" in card and str(tmp_path) not in card
    assert f"policy version 2 is in {to}" in result.stdout
    assert f"vllm serve {tmp_path / 'policy'} --enable-lora --max-lora-rank 8 --lora-modules tiny={to}" in result.stdout


def test_a_named_version_is_merged(finished: RunDirectory, tmp_path: Path) -> None:
    to = tmp_path / "out"
    result = raylign("export", finished.path, "--to", to, "--merge", "--version", 1)
    assert result.exit_code == 0, result.output
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    tokens = torch.arange(8)[None]
    adapted = PeftModel.from_pretrained(base, finished.checkpoint(1))
    merged = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32)
    with torch.no_grad():
        difference = (merged(tokens).logits - adapted(tokens).logits).abs().max()
    assert difference < 1e-4
    assert f"use it: vllm serve {to}\n" in result.stdout


def test_the_best_version_is_exported(finished: RunDirectory, tmp_path: Path) -> None:
    """The scores are 0.1 and 0.2, and the lowest is the best here."""
    finished.write_config(parse_config(finished.config().model_dump(), BEST_IS_LOWEST))
    finished.write_baseline(evaluation(0.3))
    result = raylign("export", finished.path, "--to", tmp_path / "out", "--version", "best")
    assert result.exit_code == 0, result.output
    assert "policy version 1 is in" in result.stdout
    wrong = raylign("export", finished.path, "--to", tmp_path / "other", "--version", "bset")
    assert wrong.exit_code == 2 and "'bset' is neither a number nor best" in wrong.output


def test_full_weights_take_the_rest_from_the_base(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["model.lora=null"])
    run = create_run(config.run, config)
    tensors = load_file(tmp_path / "policy" / "model.safetensors")
    with run.checkpoint_store(None).new(1, (), True, 0) as folder:
        save_file(
            {name: tensor * 2 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )
    run.write_report(RoundReport(1, 1, {}, (), {}, evaluation(0.1), {}))
    result = raylign("export", run.path, "--to", tmp_path / "out")
    assert result.exit_code == 0, result.output
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor * 2) for name, tensor in tensors.items())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_what_cannot_be_exported_is_explained(finished: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for arguments, message in (
        ([tmp_path, "--to", tmp_path / "out"], "is no run directory: it has no config.yaml"),
        ([finished.path, "--to", tmp_path / "out", "--version", 3], "version 3; there are: 1, 2"),
        ([finished.path, "--to", tmp_path / "full"], "nothing is overwritten"),
        ([finished.path, "--to", tmp_path / "out", "--version", "best"], "evaluation.metric_for_best_model is null"),
    ):
        result = raylign("export", *arguments)
        assert result.exit_code == 1
        assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("embedded:smollm2-135m", "embedded:smollm2-135m"),
        ("org/name", "org/name"),
        ("/home/someone/secret/model", "model"),
        ("../data/prompts.jsonl", "prompts.jsonl"),
        ("data/prompts.parquet", "prompts.parquet"),
    ],
)
def test_cards_name_no_path_of_this_machine(source: str, name: str) -> None:
    assert public_name(source) == name
