"""What a trainer rank is said to hold, against tensors and what autograd keeps of a policy of a few million weights."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen3Config

from raylign.config.blocks import ModelBlock, TrainerBlock
from raylign.models.load import DTYPES, adapter_config
from raylign.records import Completions
from raylign.training.logprobs import CompletionLogps
from raylign.training.masters import MasterWeights
from raylign.training.memory import GIB, ModelSize, TrainerNeeds, frozen_bytes, size_of, trainer_cures
from raylign.training.sequences import token_batch
from tests.unit.architectures import CAUSAL, config_of
from tests.unit.saved_tensors import SavedTensors
from tests.unit.tiny_models import IDS

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, **IDS, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**SHAPE, **IDS, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SHAPE, **IDS, tie_word_embeddings=True),
}
TOKENS = 256
PROMPT = 64
BLOCKS: dict[str, dict[str, Any]] = {
    "full, bfloat16": {"dtype": "bfloat16"},
    "full, float32": {"dtype": "float32"},
    "lora, bfloat16": {"dtype": "bfloat16", "lora": {"r": 16}},
    "lora, float32": {"dtype": "float32", "lora": {"r": 64}},
}
QWEN3_17 = ModelSize(
    parameters=1_720_574_976,
    linear=1_409_286_144,
    sides=1_003_520,
    layers=28,
    hidden=2048,
    inner=6144,
    queries=2048,
    keys=1024,
    head_norms=True,
)


class Measured:
    """A policy in training without ZeRO, after a step and the backward pass of the next."""

    def __init__(self, config: PreTrainedConfig, block: ModelBlock, *, checkpointing: bool = False) -> None:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).to(DTYPES[block.dtype])
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.size = size_of(shapes, config)
        if block.lora is not None:
            adapter = adapter_config(model, block.lora, "CAUSAL_LM")
            model = get_peft_model(model, adapter, autocast_adapter_dtype=False).to(DTYPES[block.dtype])
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module = CompletionLogps(model.train())
        trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.trained = sum(weight.numel() for weight in trained.values())
        state, saved = MasterWeights(trained, TrainerBlock()), SavedTensors(module)
        half = (TOKENS - PROMPT) // 2
        ids = [tuple(range(3, 3 + half)), tuple(range(5, 5 + half))]
        batch = token_batch([Completions(tuple(range(3, 3 + PROMPT)), ids)], "shared", 0)
        for step in range(2):
            saved.start()
            with saved.counting():
                loss = module(batch).tokens.logps.sum()
            torch.autograd.backward(loss)
            if step == 0:
                state.step(1e-6)
        own = {weight.data_ptr(): weight.nbytes for weight in module.parameters()}
        masters = [state.read(name, "weights") for name in state.names()]
        self.rows = {
            "weights": sum(own.values()),
            "fp32 masters": sum(master.nbytes for master in masters if master.data_ptr() not in own),
            "moments": sum(state.read(name, kind).nbytes for name in trained for kind in ("exp_avg", "exp_avg_sq")),
            "gradients": sum(gradient.nbytes for gradient in state.gradients()),
            "activations": saved.nbytes,
        }


def needs_of(size: ModelSize, trained: int, block: ModelBlock, **options: Any) -> TrainerNeeds:
    trainer = TrainerBlock.model_validate({"max_tokens_per_micro_batch": TOKENS} | options)
    return TrainerNeeds(size, trained, block, trainer, 1, None, 0, "cpu")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_rows_are_what_a_policy_holds(name: str, options: dict[str, Any]) -> None:
    block = ModelBlock.model_validate(options)
    found = Measured(MODELS[name], block)
    assert found.size.parameters > 3_000_000
    rows = needs_of(found.size, found.trained, block).rows()
    for row in ("weights", "fp32 masters", "moments", "gradients"):
        assert rows[row] == found.rows[row], row
    assert rows["activations"] == pytest.approx(found.rows["activations"], rel=0.2)
    if block.lora is not None:
        assert found.trained == block.lora.r * found.size.sides


@pytest.mark.parametrize("options", [BLOCKS["full, bfloat16"], BLOCKS["lora, bfloat16"]], ids=["full", "lora"])
def test_checkpointing_keeps_inputs_of_layers_and_one_layer(options: dict[str, Any]) -> None:
    block, config = ModelBlock.model_validate(options), MODELS["qwen3"]
    kept, plain = (Measured(config, block, checkpointing=on) for on in (True, False))
    needs = needs_of(kept.size, kept.trained, block, gradient_checkpointing=True)
    measured = kept.rows["activations"] + plain.rows["activations"] / SHAPE["num_hidden_layers"]
    assert needs.rows()["activations"] == pytest.approx(measured, rel=0.2)
    assert kept.rows["activations"] < plain.rows["activations"] / 4


def test_a_full_fine_tuning_of_1_7_billion_weights_by_hand() -> None:
    """2 + 4 + 8 + 4 bytes a weight; DeepSpeed's stages share out the last, the last two, and all."""
    block, weights = ModelBlock(dtype="bfloat16"), QWEN3_17.parameters
    own = ("weights", "fp32 masters", "moments", "gradients")

    def held(**options: Any) -> list[float]:
        rows = needs_of(QWEN3_17, weights, block, **options).rows()
        return [round(rows[row] / weights, 6) for row in own]

    assert held() == [2, 4, 8, 4]
    assert sum(held()) * weights / GIB == pytest.approx(28.8, abs=0.1)
    assert held(ranks=4) == [2, 4, 8, 4]
    assert held(ranks=4, zero_stage=1) == [2, 1, 2, 6]
    assert held(ranks=4, zero_stage=2) == [2, 1, 2, 1]
    assert held(ranks=4, zero_stage=3) == [0.5, 1, 2, 1]
    assert held(ranks=4, zero_stage=2, offload={"optimizer": True}) == [2, 0, 0, 0]
    assert held(ranks=4, zero_stage=3, offload={"optimizer": True, "param": True}) == [0, 0, 0, 0]
    host = needs_of(QWEN3_17, weights, block, ranks=4, zero_stage=3, offload={"optimizer": True, "param": True}).host()
    assert host / weights == pytest.approx(4.5)
    half = ModelBlock(dtype="float16")
    assert needs_of(QWEN3_17, weights, half).rows()["gradients"] == 4 * weights
    assert needs_of(QWEN3_17, weights, ModelBlock(dtype="float32")).rows()["fp32 masters"] == 0


def test_a_base_in_4_bits_by_hand() -> None:
    """QLoRA: 0.5 bytes a weight and a constant of 8 bits for 64 of them, of which 256 share one of 32 bits."""
    block = ModelBlock.model_validate({"load_in_4bit": True, "lora": {"r": 32}})
    rest = QWEN3_17.parameters - QWEN3_17.linear
    expected = 2 * rest + QWEN3_17.linear * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert frozen_bytes(QWEN3_17.parameters, QWEN3_17.linear, block) == pytest.approx(expected, abs=1)
    trained = 32 * QWEN3_17.sides
    assert needs_of(QWEN3_17, trained, block).rows()["weights"] == pytest.approx(expected + 2 * trained, abs=2)


@pytest.mark.parametrize(
    ("limit", "longest", "candidates", "each", "expected"),
    [(8192, 1024, None, 8, 8192), (8192, 1024, 2, 8, 8192), (8192, 100, 2, 8, 1600), (512, 1024, 2, 1, 1024)],
)
def test_a_pass_has_no_more_tokens_than_there_are(
    limit: int, longest: int, candidates: int | None, each: int, expected: int
) -> None:
    block = TrainerBlock(max_tokens_per_micro_batch=limit, per_device_train_batch_size=each)
    needs = TrainerNeeds(QWEN3_17, 1, ModelBlock(), block, longest, candidates, 0, "cpu")
    assert needs.tokens == expected


def test_gpus_keep_fp32_copies_for_transformers_norms() -> None:
    block = ModelBlock(dtype="bfloat16")
    trainer = TrainerBlock(max_tokens_per_micro_batch=1)
    cpu, gpu = (TrainerNeeds(QWEN3_17, 1, block, trainer, 1, None, 0, device) for device in ("cpu", "gpu"))
    more = gpu.rows()["activations"] - cpu.rows()["activations"]
    assert more == 28 * (2 * 2048 + 2048 + 1024) * 4


@pytest.mark.parametrize(
    ("model", "trainer", "expected"),
    [
        ({}, {}, "model.lora.r=16"),
        ({}, {"ranks": 64}, "trainer.zero_stage=3"),
        ({}, {"ranks": 2, "zero_stage": 3}, "trainer.ranks=4"),
        ({"lora": {"r": 16}}, {"max_tokens_per_micro_batch": 16384}, "trainer.gradient_checkpointing=true"),
        ({"lora": {"r": 16}}, {"gradient_checkpointing": True}, "model.load_in_4bit=true"),
    ],
)
def test_the_settings_that_free_most_are_named(model: dict[str, Any], trainer: dict[str, Any], expected: str) -> None:
    block = ModelBlock.model_validate(model)
    trained = 16 * QWEN3_17.sides if block.lora else QWEN3_17.parameters
    cures = trainer_cures(needs_of(QWEN3_17, trained, block, **trainer))
    freed = [cure.frees for cure in cures]
    assert 2 <= len(cures) <= 3 and freed == sorted(freed, reverse=True) and freed[-1] > 0
    assert expected in [cure.setting for cure in cures]


def test_a_setting_frees_what_it_is_said_to() -> None:
    before = needs_of(QWEN3_17, QWEN3_17.parameters, ModelBlock(), ranks=2)
    (sharded,) = (cure for cure in trainer_cures(before) if cure.setting == "trainer.zero_stage=3")
    after = needs_of(QWEN3_17, QWEN3_17.parameters, ModelBlock(), ranks=2, zero_stage=3)
    assert sharded.frees == before.total - after.total
    assert str(sharded) == f"trainer.zero_stage=3 ({sharded.frees / GIB:.2g} GiB less)"


def test_every_architecture_has_a_size() -> None:
    for name in CAUSAL:
        size = size_of({}, config_of(name))
        assert size.layers > 0 and size.hidden > 0 and size.keys > 0 and size.inner > 0, name
    mixture = MixtralConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2)
    assert size_of({}, mixture).inner == 96
    assert size_of({}, GPT2Config(n_embd=48, n_layer=3, n_head=4)).inner == 4 * 48
