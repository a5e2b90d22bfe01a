"""Recipes in, a checked config out: overrides, messages, rules, round trips, and every recipe that ships."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from raylign.config import OnlineDpoConfig, dump_config, load_config, load_recipe, parse_config
from raylign.config.blocks import LoraBlock, TrainerBlock
from raylign.config.losses import IpoLossBlock, SigmoidLossBlock
from raylign.config.reference import EmaReferenceBlock, InitialReferenceBlock
from raylign.config.scoring import FunctionScoringBlock
from raylign.errors import ConfigError

RECIPES = sorted((Path(__file__).resolve().parents[3] / "recipes").glob("*.yaml"))


def override(*overrides: str, **raw: Any) -> OnlineDpoConfig:
    return parse_config(raw, overrides)


def refusal(*overrides: str, **raw: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, overrides)
    return str(caught.value)


def test_an_empty_recipe_is_the_defaults() -> None:
    assert override() == OnlineDpoConfig()
    assert OnlineDpoConfig().model.lora is None and OnlineDpoConfig().max_prompt_tokens == 1024 - 64


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.lora.r=8", "model.lora.target_modules=[q_proj, v_proj]", "trainer.learning_rate=3e-4"),
        ("trainer.save_total_limit=null", "tracking.uri=http://127.0.0.1:5000", "run.dir=/data/runs", "model.lora={}"),
        ("trainer.zero_stage=3", "trainer.offload.param=true", "prompts.system='line one\n\n  line two'"),
        ("scoring.type=judge", "scoring.base_url=http://127.0.0.1:8000/v1", "scoring.model=org/judge"),
        ("loss.loss_type=apo_down", "loss.ld_alpha=0.5", "reference.policy=every", "reference.n=3"),
        (
            "loss={loss_type: mix, losses: [{loss_type: ipo, beta: 1}, {loss_type: sft}], loss_weights: [1, 0.2]}",
            "reference={policy: model, path: ./stronger}",
        ),
    ],
)
def test_a_dumped_config_loads_as_an_equal_one(overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = override(*overrides)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("loss: {beta: 0.3}\nschedule: {rounds: 7, prompts_per_round: 9}\n")
    config = load_config(recipe, ["schedule.rounds=2", "schedule.rounds=3"])
    assert (config.schedule.rounds, config.schedule.prompts_per_round) == (3, 9)
    assert config.loss == SigmoidLossBlock(beta=0.3)


def test_an_override_creates_the_block_that_is_null_or_absent() -> None:
    assert override("model.lora.r=8").model.lora == LoraBlock(r=8)
    assert override("model.lora.r=8", model={"lora": None}).model.lora == LoraBlock(r=8)
    kept = override("model.lora.r=8", model={"path": "./here", "lora": {"lora_alpha": 4}}).model
    assert (kept.path, kept.lora) == ("./here", LoraBlock(r=8, lora_alpha=4))
    assert override("model.lora=null", model={"lora": {"r": 4}}).model.lora is None


def test_a_block_of_several_kinds_is_of_the_default_kind_unless_it_says_so() -> None:
    assert override("loss.beta=0.3").loss == SigmoidLossBlock(beta=0.3)
    assert override(loss={"beta": 0.3, "loss_type": "ipo"}).loss == IpoLossBlock(beta=0.3)
    assert override("loss.loss_type=ipo", loss={"beta": 0.3}).loss == IpoLossBlock(beta=0.3)
    assert override("scoring.function=a:b").scoring == FunctionScoringBlock(function="a:b")
    assert override("reference={}").reference == InitialReferenceBlock()
    assert override("reference.policy=ema").reference == EmaReferenceBlock(alpha=0.6)


def test_overrides_leave_the_raw_mapping_alone() -> None:
    raw: dict[str, Any] = {"model": {"lora": {"r": 4}}, "trainer": {"offload": {"param": False}}}
    parse_config(raw, ["model.lora.r=8", "trainer.zero_stage=3", "trainer.offload.param=true", "loss.beta=1"])
    assert raw == {"model": {"lora": {"r": 4}}, "trainer": {"offload": {"param": False}}}


def test_numbers_that_yaml_reads_as_strings_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("trainer: {learning_rate: 3e-4, adam_epsilon: 1e-6}\n")
    config = load_config(tmp_path / "recipe.yaml", ["loss.beta=5e-2"])
    assert (config.trainer.learning_rate, config.trainer.adam_epsilon) == (3e-4, 1e-6)
    assert config.loss == SigmoidLossBlock(beta=0.05)


def test_a_value_may_hold_an_equals_sign_and_a_list() -> None:
    config = override("prompts.system=answer = 42", "model.lora.target_modules=[q_proj]")
    assert config.prompts.system == "answer = 42"
    assert config.model.lora is not None and config.model.lora.target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("modle.path=x", "modle: unknown key; did you mean 'model'?"),
        ("sampling.num_generation=4", "sampling.num_generation: unknown key; did you mean 'num_generations'?"),
        ("model.lora.rr=8", "model.lora.rr: unknown key; did you mean 'r'?"),
        ("trainer.offload.parm=true", "trainer.offload.parm: unknown key; did you mean 'param'?"),
        (
            "generators.weight_sync.trnsport=shm",
            "generators.weight_sync.trnsport: unknown key; did you mean 'transport'?",
        ),
        (
            "loss.zzz=1",
            "loss.zzz: unknown key; known keys: loss_type, beta, ld_alpha, use_weighting, f_divergence_type, "
            "f_alpha_divergence_coef, label_smoothing, soft_label_scale",
        ),
        ("scoring.functio=a:b", "scoring.functio: unknown key; did you mean 'function'?"),
        (
            "scoring.base_url=x",
            "scoring.base_url: unknown key; known keys: type, function, allow_outside, batch_size, timeout_s, "
            "max_unscored, cache",
        ),
        (
            "scoring={type: judge, base_url: 'http://h/v1', model: m, critrion: x}",
            "scoring.critrion: unknown key; did you mean 'criterion'?",
        ),
        ("reference.n=3", "reference.n: unknown key; known keys: policy"),
        (
            "loss={loss_type: mix, losses: [{loss_type: sft}, {loss_type: ipo, bta: 1}]}",
            "loss.losses.1.bta: unknown key; did you mean 'beta'?",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(wrong: str, message: str) -> None:
    assert refusal(wrong) == f"config: 1 problem(s)\n  {message}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("sampling.num_generations=1", "sampling.num_generations: Input should be greater than or equal to 2 (got 1)"),
        ("sampling.temperature=0", "sampling.temperature: Input should be greater than 0 (got 0)"),
        ("sampling.top_p=1.5", "sampling.top_p: Input should be less than or equal to 1 (got 1.5)"),
        ("loss.beta=0", "loss.beta: Input should be greater than 0 (got 0)"),
        ("loss.loss_type=ippo", "loss.loss_type: unknown value 'ippo'; did you mean 'ipo'?"),
        ("loss.loss_type=3", "loss.loss_type: unknown value '3'; known values: sigmoid, sigmoid_norm, probit, "),
        ("scoring.type=jugde", "scoring.type: unknown value 'jugde'; did you mean 'judge'?"),
        ("reference.policy=previous", "reference.policy: unknown value 'previous'; did you mean 'previous_round'?"),
        (
            "loss={loss_type: mix, losses: [{loss_type: simpo}, {loss_type: kll}]}",
            "loss.losses.1.loss_type: unknown value 'kll'; did you mean 'kl'?",
        ),
        (
            "loss={loss_type: mix, losses: [{beta: 1}]}",
            "loss.losses.0.loss_type: Field required (got {'beta': 1})",
        ),
        (
            "loss={loss_type: mix, losses: [{loss_type: simpo, beta: -1}]}",
            "loss.losses.0.beta: Input should be greater than 0 (got -1)",
        ),
        ("reference={policy: model}", "reference.path: Field required"),
        ("pairing.min_margin=.nan", "pairing.min_margin: Input should be a finite number (got nan)"),
        ("scoring.max_unscored=2", "scoring.max_unscored: Input should be less than or equal to 1 (got 2)"),
        ("scoring.function=os.system", "scoring.function: String should match pattern"),
        ("scoring={type: judge, base_url: 'http://h/v1'}", "scoring.model: Field required"),
        (
            "scoring={type: judge, base_url: 'http://h/v1', model: m, concurrency: 0}",
            "scoring.concurrency: Input should be greater than 0 (got 0)",
        ),
        ("run.name=../elsewhere", "run.name: String should match pattern"),
        ("run.seed=-1", "run.seed: Input should be greater than or equal to 0 (got -1)"),
        ("run.seed.x=1", "run.seed: Input should be a valid integer (got {'x': 1})"),
        ("trainer.zero_stage=4", "trainer.zero_stage: Input should be 0, 1, 2 or 3 (got 4)"),
        ("evaluation.confidence=1", "evaluation.confidence: Input should be less than 1 (got 1)"),
        ("model=3", "model: Input should be a valid dictionary or instance of ModelBlock (got 3)"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limit(wrong: str, message: str) -> None:
    assert f"config: 1 problem(s)\n  {message}" in refusal(wrong)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("sampling.max_new_tokens=1024",),
            "sampling.max_new_tokens=1024 leaves no room for a prompt in generators.max_model_len=1024; "
            "lower the first or raise the second",
        ),
        (
            ("generators.weight_sync.transport=lora",),
            "generators.weight_sync.transport=lora needs model.lora; add that block or use auto",
        ),
        (
            ("trainer.offload.param=true", "trainer.zero_stage=2"),
            "trainer.offload.param needs trainer.zero_stage=3, not 2",
        ),
        (("trainer.offload.optimizer=true",), "trainer.offload.optimizer needs trainer.zero_stage 1, 2 or 3, not 0"),
        (
            ("reference.policy=none",),
            "loss.loss_type=sigmoid reads reference log-probs; "
            "set reference.policy=initial, or take a loss without reference such as simpo",
        ),
        (
            ("reference.policy=none", "loss={loss_type: mix, losses: [{loss_type: simpo}, {loss_type: kl}]}"),
            "loss.loss_type=mix reads reference log-probs; "
            "set reference.policy=initial, or take a loss without reference such as simpo",
        ),
        (("model.load_in_4bit=true",), "model.load_in_4bit needs model.lora: 4-bit weights cannot be trained"),
        (
            ("model.load_in_4bit=true", "model.lora={}", "trainer.zero_stage=3"),
            "model.load_in_4bit cannot be sharded by trainer.zero_stage=3; use 0, 1 or 2",
        ),
        (
            ("model.load_in_4bit=true", "model.lora={}", "generators.weight_sync.transport=lora"),
            "generators.weight_sync.transport=lora would serve the adapter on the 16-bit base, not on the 4-bit base "
            "it is trained on; use auto, shm or nccl with model.load_in_4bit",
        ),
    ],
)
def test_rules_that_span_blocks(overrides: tuple[str, ...], message: str) -> None:
    assert refusal(*overrides) == f"config: 1 problem(s)\n  {message}"


def test_the_same_rules_let_good_combinations_pass() -> None:
    assert override("sampling.max_new_tokens=1023").max_prompt_tokens == 1
    override("generators.weight_sync.transport=lora", "model.lora.r=4")
    override("trainer.offload.param=true", "trainer.offload.optimizer=true", "trainer.zero_stage=3")
    override("trainer.offload.optimizer=true", "trainer.zero_stage=1")
    override("reference.policy=none", "loss.loss_type=simpo")
    override("reference.policy=none", "loss={loss_type: mix, losses: [{loss_type: cpo}, {loss_type: entropy}]}")
    for stage in (0, 1, 2):
        override("model.load_in_4bit=true", "model.lora.r=4", f"trainer.zero_stage={stage}")


def test_every_problem_is_listed_at_once() -> None:
    text = refusal("sampling.top_k=-1", "loss.bta=1", "schedule.rounds=0")
    assert text.startswith("config: 3 problem(s)\n")
    assert all(name in text for name in ("sampling.top_k", "loss.bta", "schedule.rounds"))


@pytest.mark.parametrize("wrong", ["sampling.top_k", "=3", "run..name=x", ".name=x", "run.=x"])
def test_an_override_without_key_or_value_is_refused(wrong: str) -> None:
    assert refusal(wrong) == f"override {wrong!r} is not of the form block.key=value; correct it"


def test_an_override_that_is_no_yaml_is_refused() -> None:
    assert refusal("run.name=[1") == "override 'run.name=[1': value is not valid YAML; quote it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- run\n- model\n", "a recipe is a mapping of blocks, not a list"),
        ("just words", "a recipe is a mapping of blocks, not a str"),
        ("run: [1", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(tmp_path / "recipe.yaml")
    assert "recipe.yaml" in str(caught.value)


def test_a_missing_recipe_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot read the recipe \(No such file or directory\)"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the recipe \(Is a directory\)"):
        load_config(tmp_path)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("# nothing but a comment\n")
    assert load_config(tmp_path / "recipe.yaml") == OnlineDpoConfig()


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "model.safetensors")


@pytest.mark.parametrize("uri", ["http://me:hunter2@mlflow.example/x", "postgresql://me:hunter2@db:5432/mlflow"])
def test_a_tracking_uri_with_credentials_is_refused(uri: str) -> None:
    text = refusal(tracking={"uri": uri})
    assert "tracking.uri: credentials in the URI would be saved with the run" in text
    assert "MLFLOW_TRACKING_USERNAME/_PASSWORD" in text


def test_the_refusal_of_credentials_does_not_repeat_them() -> None:
    assert "hunter2" not in refusal(tracking={"uri": "http://me:hunter2@mlflow.example/x"})


@pytest.mark.parametrize("uri", ["sqlite:////data/a@b/mlflow.db", "http://127.0.0.1:5000", "databricks://profile"])
def test_a_tracking_uri_without_credentials_passes(uri: str) -> None:
    assert override(tracking={"uri": uri}).tracking.uri == uri


def test_an_infinite_learning_rate_is_refused() -> None:
    assert "trainer.learning_rate" in refusal("trainer.learning_rate=.inf")


def test_a_config_is_frozen_at_every_level() -> None:
    config = OnlineDpoConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.run = config.run  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.generators.weight_sync.timeout_s = 1.0  # type: ignore[misc]


def test_a_step_trains_on_all_ranks_and_micro_batches() -> None:
    block = TrainerBlock(ranks=2, per_device_train_batch_size=3, gradient_accumulation_steps=4)
    assert block.train_batch_size == 24


def test_the_recipes_are_those_listed_here() -> None:
    assert [path.stem for path in RECIPES] == [
        "evaluate_smollm2",
        "grpo_smollm2",
        "offline_dpo_smollm2",
        "reward_model_smollm2",
        "sentiment_smollm2",
        "sft_smollm2",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_is_named_after_its_file(path: Path) -> None:
    assert load_recipe(path).run.name == path.stem.replace("_", "-")


def test_colocated_tensor_parallelism_is_refused() -> None:
    assert "placement.mode=disaggregated" in refusal("generators.tensor_parallel_size=2")


def test_a_share_of_traces_needs_traces() -> None:
    assert "set traces=true" in refusal(tracking={"traces": False, "traced_preferences": 0.7})
    assert override(tracking={"traces": False}).tracking.traced_preferences == 0.1
    assert override(tracking={"traces": False, "traced_preferences": 0}).tracking.traced_preferences == 0
