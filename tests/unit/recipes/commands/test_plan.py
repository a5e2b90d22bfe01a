"""What a plan says of a recipe, and what it refuses, with a model of 1,128 weights."""

import hashlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from raylign.config import load_config, parse_config
from raylign.config.blocks import LoraBlock, ModelBlock
from raylign.errors import ModelError, PlacementError, PromptError, RaylignError, ScorerError, WeightSyncError
from recipes import opening
from recipes.commands.plan import loss_lines
from recipes.commands.plan_online import RunPlan, make_plan, notes, print_plan
from recipes.model_checks import adapter_parameters
from tests.judges import Judged, honest
from tests.unit.tiny_policy import LORA_PARAMETERS, PARAMETERS, save_recipe

TWO_CORES_EACH = ("placement.generator_cpus=2", "placement.trainer_cpus=2")

Plan = Callable[..., RunPlan]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plans the tiny recipe with overrides, as a machine without RAY_ADDRESS does."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = save_recipe(tmp_path)
    return lambda *overrides: make_plan(load_config(recipe, overrides))


def test_the_facts_of_the_tiny_recipe(plan: Plan, tmp_path: Path) -> None:
    found = plan()
    assert (found.model.parameters, found.model.trained, found.model.context) == (PARAMETERS, LORA_PARAMETERS, 64)
    assert found.model.folder == tmp_path / "policy"
    assert (found.prompts.train, found.prompts.held_out) == (7, 3)
    assert (found.prompts.shortest, found.prompts.middle, found.prompts.longest) == (1, 3, 5)
    assert found.scorer[0] == "user_scores:length"
    assert found.scorer[1].startswith(f"{Path(__file__).parents[2] / 'user_scores.py'}:")
    assert (found.transport, found.push_bytes) == ("shm", 2 * PARAMETERS)


def test_amounts_are_upper_bounds_worked_out_by_hand(plan: Plan) -> None:
    amounts = plan().amounts
    assert amounts.sampled_per_round == 5 * 4 * 10
    assert amounts.evaluated_per_round == 3 * 1 * 10
    assert (amounts.sampled, amounts.evaluated) == (2 * 200, 3 * 30)
    assert (amounts.steps_per_round, amounts.steps) == (2 * 3, 12)
    again = plan("sampling.max_resamples=2", "pairing.type=all_pairs").amounts
    assert (again.sampled_per_round, again.sampled) == (5 * 12 * 10, 2 * 600)
    assert (again.steps_per_round, again.steps) == (2 * 5 * 66 // 2, 2 * 330)


def test_every_weight_trains_without_an_adapter(plan: Plan) -> None:
    found = plan("model.lora=null", "model.dtype=float32")
    assert found.model.trained == PARAMETERS
    assert found.push_bytes == 4 * PARAMETERS
    assert plan("model.dtype=float16").push_bytes == 2 * PARAMETERS


def test_roles_and_resources_follow_the_placement(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    found = plan("placement.mode=disaggregated", *TWO_CORES_EACH, "trainer.ranks=2")
    assert found.placement.required() == {"CPU": 6, "GPU": 0}
    assert [place.num_cpus for place in (*found.placement.generators, *found.placement.trainers)] == [2, 2, 2]


def test_too_few_cores_say_required_and_available(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    with pytest.raises(PlacementError, match=r"the roles need 4 CPU \(available 3\)"):
        plan("placement.mode=disaggregated", *TWO_CORES_EACH)


def test_gpus_that_are_not_there_are_named(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(PlacementError, match=r"1 GPU \(available 0\)"):
        plan("placement.device=gpu")


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("model.path=/nowhere/at/all", ModelError, "no such folder"),
        ("model.lora.target_modules=[q_proy]", ModelError, "q_proy"),
        ("generators.max_model_len=65", RaylignError, "max_model_len=65 exceeds the 64 positions"),
        ("generators.max_model_len=14", PromptError, "5 tokens, limit 4"),
        ("prompts.source=missing.jsonl", PromptError, "no such file"),
        ("schedule.prompts_per_round=8", PromptError, "prompts_per_round=8 exceeds the 7 training prompts"),
        ("scoring.function=user_scores:lenght", ScorerError, "did you mean 'length'"),
    ],
)
def test_what_a_run_would_refuse_a_plan_refuses(
    plan: Plan, override: str, error: type[RaylignError], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan(override)


def test_weights_that_do_not_fit_are_told_before_what_was_found_meanwhile(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise ModelError("the weights do not fit")

    monkeypatch.setattr(opening, "require_models", lambda *models: refused)
    (tmp_path / "none.jinja").write_text("no template")
    for settings in ((), (f"model.chat_template={tmp_path / 'none.jinja'}",)):
        with pytest.raises(ModelError, match="the weights do not fit"):
            plan(*settings)


def test_a_judge_is_shown_with_what_it_is_asked(plan: Plan, judged: Judged, tmp_path: Path) -> None:
    _, server = judged(honest)
    console = Console(width=300, record=True, quiet=False, file=(tmp_path / "page.txt").open("w"))
    print_plan(plan(f"scoring={{type: judge, base_url: '{server.base_url}', model: org/judge}}"), console)
    page = console.export_text()
    assert "judge org/judge" in page and f"at {server.base_url}" in page and "criterion: The better answer" in page
    assert f"at most {5 * 4 * 3} questions a round, 3 an evaluation" in page


def test_a_composition_is_shown_with_its_members(plan: Plan, judged: Judged, tmp_path: Path) -> None:
    _, server = judged(honest)
    console = Console(width=300, record=True, file=(tmp_path / "page.txt").open("w"))
    judge = f"{{type: judge, base_url: '{server.base_url}', model: org/judge}}"
    print_plan(plan(f"scoring={{type: min, scorers: {{one: {judge}, two: {judge}}}}}"), console)
    page = console.export_text()
    assert "min of one, two" in page and "two: judge org/judge" in page
    assert f"at most {2 * 5 * 4 * 3} questions a round, 6 an evaluation" in page
    with pytest.raises(ScorerError, match="^10 of 10 prompts cannot be verified, .* in column 'answer'"):
        plan("scoring={type: verifier}")


def test_a_push_that_does_not_fit_is_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelBlock, "itemsize", 10**15)
    with pytest.raises(WeightSyncError, match="free, a weight push needs"):
        plan()


def test_a_cluster_that_does_not_answer_is_named_at_once(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(PlacementError, match=f"RAY_ADDRESS={address}: no connection"):
            plan()


def test_notes_are_about_what_may_not_be_meant(plan: Plan, tmp_path: Path) -> None:
    assert notes(plan("schedule.rounds=1")) == []
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    existing, batch, passes = notes(plan("trainer.per_device_train_batch_size=6"))
    assert existing.startswith(f"{tmp_path / 'runs' / 'tiny'} exists already")
    assert batch.startswith("a step takes 6 preferences, a round gives at most 5")
    assert passes == "the rounds use each of the 7 training prompts 1.4 times"


def test_a_plan_says_where_the_initial_policy_is_not_kept(plan: Plan) -> None:
    moving = ("schedule.rounds=1", "reference.policy=previous_round")
    (note,) = notes(plan(*moving, "model.lora=null"))
    assert note.startswith("reference.policy=previous_round without an adapter keeps no copy of the initial policy")
    assert notes(plan(*moving)) == [] and notes(plan("schedule.rounds=1", "model.lora=null")) == []


def test_rows_that_a_run_would_leave_out_are_noted(plan: Plan, tmp_path: Path) -> None:
    with (tmp_path / "prompts.jsonl").open("a") as prompts:
        prompts.write("{\n")
    with pytest.raises(PromptError, match=r"1 of 11 rows cannot be used"):
        plan()
    (note,) = notes(plan("prompts.max_invalid=0.1", "schedule.rounds=1"))
    assert note == f"{tmp_path / 'prompts.jsonl'}: 1 of 11 rows left out (line 11)"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "prompts.jsonl", "tiny.yaml"]


def test_the_page_has_every_fact(plan: Plan, tmp_path: Path) -> None:
    console = Console(width=300, record=True, quiet=False, file=(tmp_path / "page.txt").open("w"))
    found = plan("trainer.gradient_accumulation_steps=2")
    print_plan(found, console)
    page = console.export_text()
    for fact in (
        f"{tmp_path / 'policy'}, in {tmp_path / 'policy'}",
        "1,128 parameters in bfloat16, up to 64 tokens",
        "LoRA adapter of rank 4: 928 parameters (82.3%)",
        "7 to train on, 3 held out",
        "1 to 5 tokens, median 3; at most 22",
        *found.scorer,
        "5 prompts x 4 candidates x at most 10 tokens = at most 200 sampled tokens",
        "at most 4 optimizer steps of 4 preferences (1 rank x 2 per device x 2 accumulated), 2 epochs",
        "at most 400 sampled tokens, 90 more in 3 evaluations, 8 optimizer steps",
        f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}, experiment raylign",
        "1 CPU of ",
        "shm: 0 MB each push",
    ):
        assert fact in page, f"{fact!r} is not in\n{page}"


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("embed_tokens", "lm_head"), ("mlp.up_proj",)])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_is_as_large_as_pefts(targets: Any, tied: bool) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(vocab_size=20, num_hidden_layers=2, head_dim=4, tie_word_embeddings=tied, **sizes)
    found = adapter_parameters(LlamaForCausalLM(config), LoraBlock(r=3, target_modules=targets))
    wanted = targets if isinstance(targets, str) else list(targets)
    theirs = get_peft_model(LlamaForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=wanted))
    assert found == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_layers_that_are_not_there_or_cannot_be_adapted_are_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="the model has no layer of these names"):
        adapter_parameters(model, LoraBlock(target_modules=("query",)))
    with pytest.raises(ValueError, match="LlamaRMSNorm is no layer that LoRA adapts"):
        adapter_parameters(model, LoraBlock(target_modules=("input_layernorm",)))


def test_a_loss_of_the_users_is_shown_with_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = "def loss(logps, block, state): ...\n"
    (tmp_path / "own.py").write_text(source)
    lines = loss_lines(parse_config({"loss": {"loss_type": "function", "function": "own:loss"}}).loss)
    found = hashlib.sha256(source.encode()).hexdigest()
    where = f"own:loss: {tmp_path}/own.py:1"
    assert lines == [("loss", "`function`, beta 0.1"), ("", where), ("", f"sha256 {found}")]
    with pytest.raises(ScorerError, match="loss.function=own:absent cannot be loaded"):
        loss_lines(parse_config({"loss": {"loss_type": "function", "function": "own:absent"}}).loss)
