"""The trees of recipes on a data set, and how a recipe's kind is found."""

from pathlib import Path

import pytest
import yaml

from raylign.config import (
    OfflineDpoConfig,
    OnlineDpoConfig,
    RunConfig,
    SftConfig,
    dump_config,
    load_config,
    load_recipe,
)
from raylign.errors import ConfigError


def loaded(folder: Path, *overrides: str, **raw: object) -> RunConfig:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load_recipe(path, overrides)


def refusal(folder: Path, *overrides: str, **raw: object) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, *overrides, **raw)
    return str(caught.value)


DATA = "data={source: a.jsonl}"


def test_the_recipe_says_which_tree_it_is(tmp_path: Path) -> None:
    assert isinstance(loaded(tmp_path), OnlineDpoConfig)
    assert isinstance(loaded(tmp_path, DATA, recipe="offline_dpo"), OfflineDpoConfig)
    sft = loaded(tmp_path, DATA, "schedule.num_train_epochs=3", "schedule.rounds_per_epoch=2", recipe="sft")
    assert isinstance(sft, SftConfig) and sft.rounds == 6 and sft.run.name == "sft"


def test_an_unknown_recipe_gets_a_suggestion(tmp_path: Path) -> None:
    assert "recipe: unknown value 'oflline_dpo'; did you mean 'offline_dpo'?" in refusal(tmp_path, recipe="oflline_dpo")
    assert "recipe: unknown value ['sft']" in refusal(tmp_path, recipe=["sft"])


def test_a_script_takes_only_its_own_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("recipe: sft\ndata: {source: a.jsonl}\n")
    with pytest.raises(ConfigError, match=r"recipe=sft: these are the settings of offline_dpo; correct recipe"):
        load_config(tmp_path / "recipe.yaml", kind=OfflineDpoConfig)


@pytest.mark.parametrize("recipe", ["offline_dpo", "sft"])
def test_the_dumped_tree_loads_as_an_equal_one(recipe: str, tmp_path: Path) -> None:
    config = loaded(tmp_path, DATA, "run.seed=3", recipe=recipe)
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_recipe(tmp_path / "dumped.yaml") == config


def test_a_data_set_is_needed_and_keys_are_checked(tmp_path: Path) -> None:
    assert "data: Field required" in refusal(tmp_path, recipe="sft")
    assert "data.sorce: unknown key; did you mean 'source'?" in refusal(tmp_path, "data.sorce=x", recipe="sft")
    assert "generators: unknown key" in refusal(tmp_path, DATA, "generators.count=2", recipe="sft")


def test_what_needs_samples_is_refused(tmp_path: Path) -> None:
    def wrong(*overrides: str) -> str:
        return refusal(tmp_path, DATA, *overrides, recipe="offline_dpo")

    assert "set reference.policy=initial" in wrong("reference.policy=sampler")
    assert "loss.loss_type=sigmoid reads reference log-probs" in wrong("reference.policy=none")
    assert "leave xpo out" in wrong("loss={loss_type: mix, losses: [{loss_type: sigmoid}, {loss_type: xpo}]}")
    assert "leave kl out" in wrong("loss={loss_type: mix, losses: [{loss_type: kto}, {loss_type: kl}]}")
    assert "set schedule.num_train_epochs" in wrong("trainer.num_train_epochs=2")


def test_lists_are_read_for_losses_of_lists(tmp_path: Path) -> None:
    for loss, rows in (("sigmoid", "pairs"), ("plackett_luce", "rankings")):
        config = loaded(tmp_path, DATA, f"loss={{loss_type: {loss}}}", recipe="offline_dpo")
        assert isinstance(config, OfflineDpoConfig) and config.rows == rows
