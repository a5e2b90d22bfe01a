"""What a plan says of the reference: kind and memory, by hand for a model of 1,128 weights in bfloat16."""

from pathlib import Path

import pytest
from rich.console import Console

from raylign.config import load_config
from raylign.errors import ModelError
from recipes.commands.plan import ReferenceFacts, reference_facts
from recipes.commands.plan_online import make_plan, print_plan
from tests.unit.tiny_policy import LORA_PARAMETERS, PARAMETERS, save_policy, save_recipe

LINEAR = 2 * 480
IN_4_BITS = (PARAMETERS - LINEAR) * 2 + LINEAR * (4 + 8 / 64 + 32 / (64 * 256)) / 8


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    return save_recipe(tmp_path)


def facts(recipe: Path, *options: str) -> ReferenceFacts:
    config = load_config(recipe, options)
    trained = PARAMETERS if config.model.lora is None else LORA_PARAMETERS
    return reference_facts(config, Path(config.model.path), trained)


@pytest.mark.parametrize(
    ("reference", "adapter", "whole"),
    [
        ("initial", 0, 2 * PARAMETERS),
        ("previous_round", 4 * LORA_PARAMETERS, 2 * PARAMETERS),
        ("every", 4 * LORA_PARAMETERS, 2 * PARAMETERS),
        ("ema", 4 * LORA_PARAMETERS, 6 * PARAMETERS),
        ("sampler", 0, 0),
        ("model", 2 * PARAMETERS, 2 * PARAMETERS),
    ],
)
def test_memory_of_the_reference(reference: str, adapter: int, whole: int, recipe: Path) -> None:
    options = [f"reference.policy={reference}"]
    options += [f"reference.path={save_policy(recipe.parent / 'other')}"] if reference == "model" else []
    assert facts(recipe, *options).bytes_per_rank == adapter
    options.append("model.lora=null")
    assert facts(recipe, *options).bytes_per_rank == whole
    assert facts(recipe, *options, "trainer.zero_stage=3", "trainer.ranks=2").bytes_per_rank == whole / 2


def test_a_loss_without_reference_needs_none(recipe: Path) -> None:
    found = facts(recipe, "loss.loss_type=simpo", "reference.policy=none")
    assert (found.what, found.bytes_per_rank) == ("none", 0)


def test_4_bits_shrink_the_base_and_a_model_beside_it(recipe: Path) -> None:
    other = save_policy(recipe.parent / "other")
    options = ["model.load_in_4bit=true", "reference.policy=model", f"reference.path={other}"]
    assert facts(recipe, *options).bytes_per_rank == pytest.approx(IN_4_BITS, abs=1)
    constants = LINEAR * (32 / 64 - 8 / 64 - 32 / (64 * 256)) / 8
    found = facts(recipe, *options, "model.use_bnb_nested_quant=false").bytes_per_rank
    assert found == pytest.approx(IN_4_BITS + constants, abs=1)


def test_the_plan_shows_the_reference_and_the_base(recipe: Path) -> None:
    console = Console(width=200, record=True)
    with console.capture() as shown:
        print_plan(make_plan(load_config(recipe, ["reference.policy=ema", "model.load_in_4bit=true"])), console)
    assert "ema: a moving average that takes 0.6 of the policy after every round; 0 MB on every rank" in shown.get()
    assert "LoRA adapter of rank 4 on a base in 4 bits (nf4, double quantisation; 0 MB on every rank)" in shown.get()


def test_a_reference_that_a_run_would_refuse_is_refused(recipe: Path) -> None:
    with pytest.raises(ModelError, match=r"no such folder .*; correct reference\.path"):
        make_plan(load_config(recipe, ["reference.policy=model", "reference.path=./nowhere"]))
