"""Recipes on a data set, from a raw file to a trained, exported and evaluated model, with a tiny one."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors import team
from actors.supervision.generators import SupervisedGenerators
from raylign.config import EvaluateConfig, RunConfig, load_recipe
from raylign.config.load import RECIPES, parse_tree
from raylign.records import HeldOutEvaluation
from raylign.run.directory import RunDirectory, run_path
from raylign.run.files import read_record
from raylign.run.tables import read_candidates
from recipes.commands.export import export_run
from recipes.commands.resume import resumed_config
from recipes.evaluate import REPORT, main
from recipes.recipe import recipe_of
from tests.integration.tiny import SPREAD_SCORES
from tests.mlflow_servers import put_database

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lent")]

ROWS = [
    {"instruction": f"Say {word} number {number}", "chosen": f"good {word}", "rejected": f"bad {word} {number}"}
    for number in range(8)
    for word in ("one", "two", "three", "four")
]


def config_of(recipe: str, model: str, folder: Path, **loss: Any) -> RunConfig:
    name = recipe.partition(":")[0]
    (folder / "rows.json").write_text(json.dumps(ROWS))
    put_database(folder / "runs/mlflow.db")
    raw = {
        "recipe": recipe,
        "run": {"dir": str(folder / "runs"), "name": name},
        "model": {"path": model, "dtype": "float32", "lora": {"r": 8, "lora_alpha": 16}},
        "data": {"source": str(folder / "rows.json"), "held_out": 8, "max_length": 128},
        "trainer": {"learning_rate": 0.02, "per_device_train_batch_size": 8, "adam_epsilon": 1e-6},
        "schedule": {"num_train_epochs": 2},
        "placement": {"trainer_cpus": 1},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw | ({"loss": loss} if loss else {})))
    return load_recipe(folder / f"{name}.yaml")


def evaluations(directory: RunDirectory) -> list[HeldOutEvaluation]:
    found = [directory.baseline(), *(report.evaluation for report in directory.reports())]
    assert all(isinstance(one, HeldOutEvaluation) for one in found)
    return [one for one in found if isinstance(one, HeldOutEvaluation)]


@pytest.fixture(scope="module")
def tuned(lent: dict[str, float], served_llama: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The config of a run of SFT that is finished."""
    config = config_of("sft", served_llama, tmp_path_factory.mktemp("tuned"))
    recipe_of(config).main(config)
    return config


@pytest.mark.parametrize(
    ("recipe", "metric", "loss"),
    [
        ("offline_dpo", "rewards/accuracies", {"loss_type": "function", "function": "my_losses:dpo"}),
        ("sft", "loss", {}),
        ("reward_model", "rewards/accuracies", {"loss_type": "bradley_terry"}),
    ],
)
def test_from_a_raw_file_to_an_exported_model(
    recipe: str,
    metric: str,
    loss: dict[str, Any],
    tiny_llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """The trainers' actors are started elsewhere: a loss of the user's reaches them with the run directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_losses.py").write_text(MY_LOSS)
    tuned = recipe == "sft"
    config = request.getfixturevalue("tuned") if tuned else config_of(recipe, tiny_llama, tmp_path, **loss)
    directory = RunDirectory(recipe_of(config).main(config))
    before, _, after = evaluations(directory)
    assert before.metric == after.metric == metric and after.rows == 8
    assert after.metrics["loss"] < before.metrics["loss"]
    assert after.value < before.value if metric == "loss" else after.value > 0.8
    if recipe == "offline_dpo":
        assert before.value == 0.5 and before.metrics["loss"] == pytest.approx(0.6931472, abs=1e-6)
    if recipe == "reward_model":
        assert (directory.round(2) / "reliability.png").read_bytes().startswith(b"\x89PNG")
        assert after.metrics["calibration/nll"] < before.metrics["calibration/nll"]
    # Started again, it has nothing to do.
    assert recipe_of(config).main(config) == directory.path
    exported = export_run(directory.path, tmp_path / "exported", merge=True, version=None)
    kind = AutoModelForSequenceClassification if recipe == "reward_model" else AutoModelForCausalLM
    kind.from_pretrained(exported.folder)
    client = MlflowClient(f"sqlite:///{config.run.dir}/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "raylign"]
    (run, *rounds) = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    assert run.info.run_name == recipe and run.info.status == "FINISHED" and len(rounds) == 2
    assert run.data.metrics[f"eval/{metric}"] == pytest.approx(after.value)
    assert run.data.params["data.held_out"] == "8"


MY_LOSS = """
from torch.nn.functional import logsigmoid


def dpo(logps, block, state):
    h = logps.policy - logps.reference
    return -logsigmoid(block.beta * (h[:, 0] - h[:, 1]))
"""
MINE = """
from raylign.config import SftConfig
from raylign.config.tree import RunConfig
from raylign.export.card import Method
from recipes.commands.plan_offline import show_offline_plan
from recipes.opening import offline_run
from recipes.recipe import Recipe
from recipes.sft import train


class MySettings(SftConfig):
    greeting: str = "hello"


def main(config):
    with offline_run(config, __file__) as (run, data, trainers):
        run.say(f"{config.greeting} from my loop")
        train(run, data, trainers, config)
    return run.directory.path


def method(config):
    return Method("a loop\\nof my own", "my loop", ("mine",))


RECIPE = Recipe(MySettings, main, show_offline_plan, method)
"""


def test_a_recipe_from_outside_runs_plans_resumes_and_exports(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_loop.py").write_text(MINE)
    config = config_of("my_loop:RECIPE", tiny_llama, tmp_path)
    recipe_of(config).plan(config, Console(width=200))
    assert "my_loop:RECIPE" in capsys.readouterr().out
    directory = RunDirectory(recipe_of(config).main(config))
    assert "hello from my loop" in capsys.readouterr().out and len(directory.reports()) == 2
    longer = resumed_config(directory.path, ["schedule.num_train_epochs=3", "greeting=again"])
    assert recipe_of(longer).main(longer) == directory.path
    assert "again from my loop" in capsys.readouterr().out and len(directory.reports()) == 3
    exported = export_run(directory.path, tmp_path / "exported", merge=True, version=None)
    assert "trained with raylign by a loop\nof my own" in (exported.folder / "README.md").read_text()


def engine_starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many generators have been started, each time that some are."""
    found: list[int] = []
    start = team._start_generators

    def noted(*args: Any) -> SupervisedGenerators:
        generators = start(*args)
        found.append(len(generators.handles))
        return generators

    monkeypatch.setattr(team, "_start_generators", noted)
    return found


def test_a_run_against_its_first_version_and_given_answers(
    tuned: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "spread.py").write_text(SPREAD_SCORES)
    started = engine_starts(monkeypatch)
    run = run_path(tuned.run)
    rows = [
        {"instruction": f"Say {word}", "output": "good", "generator": "nobody", "dataset": word[0]}
        for word in ("one", "two", "three", "four")
    ]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(rows))
    raw: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "runs"), "name": "compared"},
        "policy": {"type": "run", "run": str(run)},
        "opponents": {"initial": {"type": "run", "run": str(run), "version": 0}, "nobody": {"type": "answers"}},
        "prompts": {"source": str(tmp_path / "alpaca_eval.json")},
        "scoring": {"function": "spread:score"},
        "evaluation": {"max_new_tokens": 8, "category": "dataset"},
        "generators": {"max_model_len": 128, "kv_cache_gb": 0.1},
        "placement": {"generator_cpus": 1},
    }
    put_database(tmp_path / "runs/mlflow.db")
    config = parse_tree(raw, EvaluateConfig, "test")
    folder = main(config)
    assert started == [1], "both versions are served by one engine"
    found = read_record(folder / "report.json", REPORT, "")
    assert {name: one.overall.prompts for name, one in found.opponents.items()} == {"initial": 4, "nobody": 4}
    assert {name: one.prompts for name, one in found.opponents["nobody"].categories.items()} == {"t": 2, "o": 1, "f": 1}
    texts = {}
    for name in ("", "-1", "-2"):
        candidates, scores = read_candidates(folder / f"rounds/0000/candidates{name}.parquet")
        texts[name] = [candidate.text for candidate in candidates]
        assert all(score.value is not None for score in scores)
    assert texts["-2"] == ["good"] * 4
    assert texts[""] != texts["-1"], "the adapter was trained, and changes what the model says"
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs/mlflow.db'}")
    (experiment,) = (one for one in client.search_experiments() if one.name == "raylign")
    (shown,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'compared'")
    assert shown.data.metrics["eval/win_rate"] == found.opponents["initial"].overall.rate
    assert shown.info.status == "FINISHED"
    capsys.readouterr()
    before = (folder / "report.json").read_bytes()
    assert main(config) == folder and (folder / "report.json").read_bytes() == before
    assert "nobody: answers in column 'output'" in " ".join(capsys.readouterr().out.split())


def test_every_recipe_has_a_script_of_its_name() -> None:
    assert all((Path(__file__).parents[2] / f"recipes/{name}.py").is_file() for name in RECIPES)
