"""What `raylign plan` and `raylign resume` say of recipes on a data set, with a model of 1,128 weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from raylign.config import OfflineConfig, load_recipe
from raylign.errors import ConfigError, DataError, ModelError, PlacementError
from raylign.run.directory import continue_or_create
from recipes.commands.plan_offline import OfflinePlan, make_offline_plan, print_offline_plan
from recipes.commands.resume import resumed_config
from tests.unit.tiny_policy import LORA_PARAMETERS, PARAMETERS, save_policy

CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}say {{ m.content }} </s> "
    "{% else %}{{ m.content }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}say {% endif %}"
)
WORDS = ("say", "good", "bad", "film", "one", "two", "three")
Load = Callable[..., OfflineConfig]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """A recipe on six pairs, with overrides."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    save_policy(tmp_path / "policy")
    (tmp_path / "chat.jinja").write_text(CHAT)
    rows = [{"prompt": word, "chosen": "good", "rejected": "film two"} for word in WORDS[:6]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw: dict[str, Any] = {
        "recipe": "offline_dpo",
        "run": {"dir": str(tmp_path / "runs"), "name": "tiny"},
        "model": {
            "path": str(tmp_path / "policy"),
            "lora": {"r": 4, "lora_alpha": 8},
            "chat_template": str(tmp_path / "chat.jinja"),
        },
        "data": {"source": str(tmp_path / "rows.jsonl"), "held_out": 2, "max_length": 64},
        "trainer": {"per_device_train_batch_size": 2},
        "schedule": {"num_train_epochs": 3, "rounds_per_epoch": 2},
        "placement": {"device": "cpu", "trainer_cpus": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))

    def loaded(*overrides: str) -> OfflineConfig:
        config = load_recipe(tmp_path / "recipe.yaml", overrides)
        assert isinstance(config, OfflineConfig)
        return config

    return loaded


def shown(plan: OfflinePlan) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        print_offline_plan(plan, console)
    return captured.get()


def test_the_facts_of_a_plan(load: Load) -> None:
    plan = make_offline_plan(load())
    assert (plan.model.parameters, plan.model.trained) == (PARAMETERS, LORA_PARAMETERS)
    assert (len(plan.data.train), len(plan.data.held_out)) == (4, 2)
    # 4 rows in 2 parts of 2, one step each, 3 epochs.
    assert plan.steps == 6
    text = shown(plan)
    assert "offline_dpo" in text and "4 rows to train on, 2 held out" in text and "6 rounds" in text


GUARDED = (
    "guard=[{measure: displacement, above: 5, action: raise_beta, factor: 3}, "
    "{measure: rewards/chosen, below: -2, action: stop, after_rounds: 2}]",
    "evaluation={metric_for_best_model: loss, greater_is_better: false, early_stopping_patience: 1, "
    "early_stopping_threshold: 0.01}",
)


def test_a_plan_says_what_is_watched_and_when_the_run_ends(load: Load) -> None:
    plain, text = shown(make_offline_plan(load())), " ".join(shown(make_offline_plan(load(*GUARDED))).split())
    assert "guard" not in plain and "best version" not in plain
    assert "guard displacement above 5: loss.beta x 3 from the next round on" in text
    assert "rewards/chosen below -2, from round 3 on: the run ends here" in text
    assert "best version the one with the lowest loss: its checkpoint stays, raylign export --version best" in text
    assert "the run ends once 1 round in a row gave none that was better by more than 0.01" in text


def test_a_run_goes_on_with_another_guard(load: Load) -> None:
    directory = continue_or_create(load()).path
    assert resumed_config(directory, list(GUARDED)).rules == load(*GUARDED).rules


def test_ktos_rows_carry_answers_of_other_rows(load: Load) -> None:
    plain, data = (make_offline_plan(load(f"loss={{loss_type: {name}}}")).data for name in ("sigmoid", "kto"))
    assert [row.kl_sample for row in plain.train + plain.held_out] == [None] * 6
    assert [row.prompt for row in data.train + data.held_out] == [row.prompt for row in plain.train + plain.held_out]
    for rows in (data.train, data.held_out):
        answers = {candidate.token_ids for row in rows for candidate in row.candidates}
        for row in rows:
            assert row.kl_sample and row.kl_sample.prompt_token_ids == row.prompt.token_ids
            assert row.kl_sample.token_ids in answers
    with pytest.raises(DataError, match="the 1 rows held out have 1 different prompt; give at least 2"):
        make_offline_plan(load("loss={loss_type: kto}", "data.held_out=1"))


def test_what_cannot_run_is_refused(load: Load) -> None:
    with pytest.raises(PlacementError, match="the cluster is too small"):
        make_offline_plan(load("trainer.ranks=500"))
    with pytest.raises(ConfigError, match="data.max_length=65 exceeds the 64 positions"):
        make_offline_plan(load("data.max_length=65"))
    with pytest.raises(DataError, match="data.held_out=6 leaves none of 6"):
        make_offline_plan(load("data.held_out=6"))


def test_a_reference_that_a_run_would_refuse_is_refused(load: Load, tmp_path: Path) -> None:
    other = save_policy(tmp_path / "other")
    reference = f"reference={{policy: model, path: {other}}}"
    make_offline_plan(load(reference))
    facts = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(facts | {"max_position_embeddings": 32}))
    with pytest.raises(ConfigError, match=r"data.max_length=64 exceeds the 32 positions of .*other; lower it"):
        make_offline_plan(load(reference))
    (other / "config.json").write_text(json.dumps(facts | {"num_hidden_layers": facts["num_hidden_layers"] + 1}))
    with pytest.raises(ModelError, match=r"other: \d+ weights are not in the files"):
        make_offline_plan(load(reference))


def test_a_run_goes_on_with_other_settings_but_not_on_other_rows(load: Load) -> None:
    directory = continue_or_create(load()).path
    resumed = resumed_config(directory, ["trainer.learning_rate=0.5"])
    assert resumed.trainer.learning_rate == 0.5
    for fixed in ("data.held_out=1", "recipe=sft", "run.seed=1", "model.lora.r=2"):
        with pytest.raises(ConfigError):
            resumed_config(directory, [fixed])
    with pytest.raises(ConfigError, match="reference.policy: initial -> previous_round"):
        resumed_config(directory, ["reference={policy: previous_round}"])


def test_scores_that_do_not_compare_are_noted_where_a_loss_reads_them(load: Load, tmp_path: Path) -> None:
    rows = [{"prompt": word, "chosen": "good", "rejected": "film two"} for word in WORDS[:6]]
    rows[0] |= {"score_chosen": "9", "score_rejected": "2"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = shown(make_offline_plan(load("loss.soft_label_scale=1")))
    assert "5 rows have order alone (their scores are places), 1 rows have scores" in text.replace("\n", " ")
    assert "do not compare" not in shown(make_offline_plan(load())) and "on 2:" not in shown(make_offline_plan(load()))
