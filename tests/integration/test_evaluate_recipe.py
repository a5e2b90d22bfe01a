"""A trained run against its first version and against given answers, on real Ray, vLLM and MLflow."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from raylign.config import EvaluateConfig
from raylign.config.load import parse_tree
from raylign.run.files import read_record
from raylign.run.tables import read_candidates
from recipes.evaluate import REPORT, main
from recipes.recipe import recipe_of
from tests.integration.test_offline_recipes import config_of
from tests.integration.tiny import SPREAD_SCORES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("resources")]


def test_a_run_against_its_first_version_and_given_answers(
    served_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "spread.py").write_text(SPREAD_SCORES)
    trained = config_of("sft", served_llama, tmp_path)
    run = recipe_of(trained).main(trained)
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
    config = parse_tree(raw, EvaluateConfig, "test")
    folder = main(config)
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
