"""Whose answers are compared, found on disk: with a run of a model of 1,128 weights and its adapter."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from actors.placement import plan_evaluation
from raylign.config import EvaluateConfig, load_config
from raylign.config.load import parse_tree
from raylign.errors import ConfigError, PlacementError, RaylignError
from raylign.records import Evaluation, RoundReport
from raylign.run.directory import RunDirectory, create_run
from raylign.training.memory import GIB
from recipes.commands.plan_evaluate import show_evaluation_plan
from recipes.memory import evaluation_memory
from recipes.sides import find_sides, in_turn, side_inputs
from tests.unit.tiny_policy import PARAMETERS, save_recipe

FOUND = Evaluation(0.5, 0.4, 0.6, 2.0, 8.0, 0.5, 1.0, 3, 0)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """One finished round, with a checkpoint."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(save_recipe(tmp_path))
    directory = create_run(config.run, config)
    with directory.checkpoint_store(None).new(1, (), True, 0) as folder:
        save_file({"lora": torch.zeros(1)}, folder / "adapter_model.safetensors")
    directory.write_report(RoundReport(1, 1, {}, (), {}, FOUND, {}))
    return directory


def config_of(run: RunDirectory, opponents: dict[str, Any], **changes: Any) -> EvaluateConfig:
    raw = {
        "run": {"dir": str(run.path.parent), "name": "compared"},
        "policy": {"type": "run", "run": str(run.path)},
        "opponents": opponents,
        "prompts": {"source": str(run.path.parents[1] / "prompts.jsonl")},
        "generators": {"max_model_len": 32},
        "evaluation": {"max_new_tokens": 10},
        "placement": {"device": "cpu", "generator_cpus": 1},
    }
    return parse_tree(raw | changes, EvaluateConfig, "test")


def test_sides_of_one_model_answer_one_after_the_other(run: RunDirectory) -> None:
    """The model as it is first: engines that have taken an adapter never let go of it."""
    policy = run.path.parents[1] / "policy"
    initial = {"type": "run", "run": str(run.path), "version": 0}
    sides = find_sides(config_of(run, {"base": {"type": "model", "path": str(policy)}, "initial": initial}))
    assert [side.name for side in sides] == ["policy", "base", "initial"]
    assert [sides[number].name for number in in_turn(sides)] == ["initial", "policy", "base"]


def test_a_run_its_first_version_and_a_folder(run: RunDirectory) -> None:
    policy = run.path.parents[1] / "policy"
    initial = {"type": "run", "run": str(run.path), "version": 0}
    sides = find_sides(config_of(run, {"initial": initial, "base": {"type": "model", "path": str(policy)}}))
    assert [(side.name, side.version, side.checkpoint) for side in sides] == [
        ("policy", 1, run.checkpoint(1)),
        ("initial", 0, None),
        ("base", 0, None),
    ]
    assert {side.folder for side in sides} == {str(policy.resolve())}
    assert sides[0].model.lora is not None and sides[2].model.lora is None
    assert sides[0].told == f"version 1 of {run.path}" and len(sides[0].prompts.held_out) == 10
    before = side_inputs(sides, "prompts.source")
    assert set(before) == {"prompts.source", "policy", "initial", "base"}
    assert before["initial"].sha256 == before["base"].sha256 != before["policy"].sha256


def test_answers_from_a_file(run: RunDirectory) -> None:
    rows = [json.loads(line) for line in (run.path.parents[1] / "prompts.jsonl").read_text().splitlines()]
    file = run.path.parents[1] / "answers.jsonl"
    file.write_text("".join(json.dumps({**row, "said": row["prompt"] * 2}) + "\n" for row in reversed(rows)))
    given = {"type": "answers", "source": str(file), "column": "said"}
    _, side = find_sides(config_of(run, {"given": given}))
    assert side.given is not None and len(side.given) == 10
    assert [one.text for one in side.given[:2]] == ["goodgood", "badbad"]


@pytest.mark.parametrize(
    ("opponent", "refusal"),
    [
        ({"type": "run", "version": 1}, "is the policy itself"),
        ({"type": "run", "version": 7}, "no checkpoint of a finished round for version 7; there are: 1"),
        ({"type": "run", "run": "/nowhere"}, "/nowhere is no run directory"),
        ({"type": "answers"}, "have no answer in column 'output' of their own rows"),
    ],
)
def test_sides_that_could_not_answer_are_refused(run: RunDirectory, opponent: dict[str, Any], refusal: str) -> None:
    missing = {} if opponent["type"] == "answers" else {"run": str(run.path)}
    with pytest.raises(RaylignError, match=refusal):
        find_sides(config_of(run, {"other": missing | opponent}))


def test_an_adapter_on_4_bits_is_to_be_exported(run: RunDirectory) -> None:
    config = run.config(["model.load_in_4bit=true"])
    run.write_config(config)
    with pytest.raises(ConfigError, match="raylign export .* --merge"):
        find_sides(config_of(run, {"initial": {"type": "run", "run": str(run.path), "version": 0}}))


def test_the_plan_tells_who_answers_how_much(run: RunDirectory) -> None:
    file = io.StringIO()
    config = config_of(run, {"initial": {"type": "run", "run": str(run.path), "version": 0}})
    show_evaluation_plan(config, Console(file=file, width=300))
    text = " ".join(file.getvalue().split())
    assert f"policy version 1 of {run.path}" in text and "10 prompts" in text
    assert "2 sides to sample, 1 a prompt: at most 200 tokens" in text
    assert "1 CPU of" in text and "to score, when the generators are gone" in text
    assert not (run.path.parent / "compared").exists()


def test_every_engine_has_the_gpu_to_itself_and_must_fit(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 has an adapter of one weight; the first version and the folder are one model."""
    monkeypatch.setattr("recipes.commands.plan.gpus", lambda: 0)
    policy, initial = run.path.parents[1] / "policy", {"type": "run", "run": str(run.path), "version": 0}
    placement = {"gpu_memory_gb": 24, "scorer_gpus": 0.25, "scorer_cpus": 1}
    opponents = {"initial": initial, "base": {"type": "model", "path": str(policy)}}
    config = config_of(run, opponents, placement=placement)
    sides, (answering, scoring) = find_sides(config), plan_evaluation(config, {"CPU": 64, "GPU": 8}, samples=True)
    found = evaluation_memory(config, sides, answering, scoring, 24 * GIB)
    assert [(phase.where, phase.name) for phase in found.phases] == [
        ("generator", "answering as policy"),
        ("generator", "answering as initial, base"),
        ("scorer", "scoring"),
    ]
    weights = [phase.rows.get("engine weights*") for phase in found.phases]
    assert weights == [2 * (PARAMETERS + 1), 2 * PARAMETERS, None]
    assert sum(found.phases[0].rows.values()) == int(0.85 * 24 * GIB) and found.phases[2].total == 6 * GIB
    found.require_fit()
    with pytest.raises(PlacementError, match=r"an engine needs 1.00 GiB .*generators.gpu_memory_utilization=0.85 of"):
        evaluation_memory(config, sides, answering, scoring, GIB).require_fit()
    file = io.StringIO()
    show_evaluation_plan(config, Console(file=file, width=300))
    text = " ".join(file.getvalue().split())
    assert "GiB of a GPU" in text and "answering as initial, base" in text and "together 20.40 20.40 6.00" in text
    with pytest.raises(PlacementError, match="an engine needs"):
        show_evaluation_plan(config_of(run, opponents, placement=placement | {"gpu_memory_gb": 1}), Console(file=file))


def test_without_a_side_to_sample_there_is_no_engine(run: RunDirectory) -> None:
    config = config_of(run, {"initial": {"type": "run", "run": str(run.path), "version": 0}})
    side, _ = find_sides(config)
    answering, scoring = plan_evaluation(config, {"CPU": 64}, samples=False)
    assert evaluation_memory(config, [replace(side, given=())], answering, scoring, None).phases == ()
