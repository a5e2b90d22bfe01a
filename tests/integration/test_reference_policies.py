"""Reference policies over real trainer groups: what each one is, and when it moves."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from actors.trainer.group import TrainerGroup
from raylign.config.losses import SimpoLossBlock
from raylign.config.reference import (
    EmaReferenceBlock,
    EveryReferenceBlock,
    ModelReferenceBlock,
    NoReferenceBlock,
    PreviousRoundReferenceBlock,
    ReferenceBlock,
    SamplerReferenceBlock,
)
from raylign.records import Preference
from raylign.training.preferences import completions_of
from tests.integration.ranks import LORA, Processes, preferences, spec_of, train_round

pytestmark = pytest.mark.slow

PAIRS, HELD_OUT = preferences(9)[:8], preferences(9)[8:]
SAME = 2e-4
"""Largest difference of the summed log-probs (nats) of a completion that are computed in two ways in float32."""
LN_2 = pytest.approx(math.log(2), abs=1e-6)
MODELS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": LORA}}
TRAINERS: dict[str, dict[str, Any]] = {
    "1 rank": {"per_device_train_batch_size": 4},
    "2 ranks, ZeRO 3": {"ranks": 2, "zero_stage": 3, "per_device_train_batch_size": 2},
}


@pytest.fixture(scope="module")
def other(ranks_llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another checkpoint of ranks_llama's architecture and tokenizer."""
    folder = tmp_path_factory.mktemp("other-llama")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ranks_llama))
    model.save_pretrained(folder)
    return str(folder)


def of_reference(group: TrainerGroup, pairs: Sequence[Preference]) -> list[float]:
    rows = group.reference_logprobs([completions_of(pair) for pair in pairs])
    return [sum(own) for row in rows for own in row]


def of_initial(group: TrainerGroup, pairs: Sequence[Preference]) -> list[float]:
    rows = group.initial_logprobs([completions_of(pair) for pair in pairs])
    return [sum(own) for row in rows for own in row]


def of_policy(group: TrainerGroup, pairs: Sequence[Preference]) -> list[float]:
    rows = [(pair.prompt.token_ids, candidate.token_ids) for pair in pairs for candidate in pair.candidates]
    found = group.token_logps([(*prompt, *completion) for prompt, completion in rows])
    return [math.fsum(logps[-len(row[1]) :]) for logps, row in zip(found, rows, strict=True)]


def of_model(model: nn.Module, pairs: Sequence[Preference]) -> list[float]:
    """By transformers alone, one completion at a time."""
    found = []
    for pair in pairs:
        for candidate in pair.candidates:
            ids = torch.tensor([[*pair.prompt.token_ids, *candidate.token_ids]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].float().log_softmax(-1)
            found.append(logps.gather(-1, ids[0, 1:, None])[-len(candidate.token_ids) :].sum().item())
    return found


def loaded(folder: str) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def stored_logps(pairs: Sequence[Preference]) -> list[float]:
    return [logp for pair in pairs for logp in pair.reference_logps]


@pytest.mark.parametrize(
    "model", [{"lora": LORA}, {"lora": LORA, "dtype": "bfloat16"}, {"lora": LORA, "load_in_4bit": True}]
)
def test_a_disabled_adapter_is_the_frozen_copy(ranks_llama: str, ranks: Processes, model: dict[str, Any]) -> None:
    trainer = {"per_device_train_batch_size": 4, "num_train_epochs": 2}
    found = []
    for reference in (None, ModelReferenceBlock(path=ranks_llama)):
        group = ranks.group(spec_of(ranks_llama, model, trainer, reference=reference))
        before = of_reference(group, preferences(12))
        steps = train_round(group, preferences(12))
        assert of_reference(group, preferences(12)) == before
        found.append((before, [(step["loss"], step["grad_norm"]) for step in steps]))
    assert len(found[0][1]) == 6
    assert found[0] == found[1]


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_previous_round_is_the_policy_at_the_start_of_the_round(
    ranks_llama: str, ranks: Processes, model: dict[str, Any], trainer: dict[str, Any]
) -> None:
    group = ranks.group(spec_of(ranks_llama, model, trainer, reference=PreviousRoundReferenceBlock()))
    for rounds_done in range(2):
        policy = of_policy(group, HELD_OUT)
        steps = train_round(group, PAIRS, rounds_done=rounds_done)
        assert steps[0]["loss"] == LN_2 and steps[0]["rewards/margins"] == 0.0
        assert steps[1]["loss"] != LN_2
        assert of_reference(group, HELD_OUT) == pytest.approx(policy, abs=SAME)
        assert of_policy(group, HELD_OUT) != pytest.approx(policy, abs=SAME)


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_hard_update_comes_after_every_second_round(
    ranks_llama: str, ranks: Processes, model: dict[str, Any], trainer: dict[str, Any]
) -> None:
    group = ranks.group(spec_of(ranks_llama, model, trainer, reference=EveryReferenceBlock(n=2)))
    policy, reference = [of_policy(group, HELD_OUT)], []
    for rounds_done in range(4):
        steps = train_round(group, PAIRS, rounds_done=rounds_done)
        assert (steps[0]["loss"] == LN_2) is (rounds_done in (0, 2))
        reference.append(of_reference(group, HELD_OUT))
        policy.append(of_policy(group, HELD_OUT))
    assert reference[0] == reference[1] == pytest.approx(policy[0], abs=SAME)
    assert reference[2] == reference[3] == pytest.approx(policy[2], abs=SAME)
    assert all(before != pytest.approx(after, abs=SAME) for before, after in pairwise(policy))


@pytest.mark.parametrize("reference", [PreviousRoundReferenceBlock(), EmaReferenceBlock()], ids=lambda one: one.policy)
@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
def test_the_initial_policy_stays_at_hand_beside_an_adapters_reference(
    ranks_llama: str, ranks: Processes, trainer: dict[str, Any], reference: ReferenceBlock
) -> None:
    group = ranks.group(spec_of(ranks_llama, MODELS["lora"], trainer, reference=reference))
    initial = of_model(loaded(ranks_llama), HELD_OUT)
    for rounds_done in range(2):
        train_round(group, PAIRS, rounds_done=rounds_done)
        assert of_initial(group, HELD_OUT) == pytest.approx(initial, abs=SAME)
    assert of_reference(group, HELD_OUT) != pytest.approx(initial, abs=SAME)
    whole = ranks.group(spec_of(ranks_llama, MODELS["full"], trainer, reference=reference))
    assert of_initial(whole, HELD_OUT) == []


def _mixed(before: dict[str, Tensor], after: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    return {name: alpha * after[name] + (1 - alpha) * before[name] for name in before}


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_soft_update_is_the_mix_of_the_saved_weights(
    ranks_llama: str, ranks: Processes, name: str, trainer: dict[str, Any], tmp_path: Path
) -> None:
    group = ranks.group(spec_of(ranks_llama, MODELS[name], trainer, reference=EmaReferenceBlock(alpha=0.6)))
    reference = _saved(group, name, tmp_path)
    for rounds_done in range(3):  # the second mix is of the first
        if rounds_done:
            reference = _mixed(reference, _saved(group, name, tmp_path), alpha=0.6)
        train_round(group, PAIRS, rounds_done=rounds_done)
        expected = of_model(_model_of(reference, name, ranks_llama, tmp_path), HELD_OUT)
        assert of_reference(group, HELD_OUT) == pytest.approx(expected, abs=SAME)


def _saved(group: TrainerGroup, name: str, folder: Path) -> dict[str, Tensor]:
    if name == "lora":
        group.save_adapter(str(folder))
        return load_file(folder / "adapter_model.safetensors")
    group.save_weights(str(folder / "model.safetensors"))
    return load_file(folder / "model.safetensors")


def _model_of(weights: dict[str, Tensor], name: str, base: str, folder: Path) -> nn.Module:
    model = loaded(base)
    if name == "full":
        missing = model.load_state_dict(weights, strict=False)
        assert missing == (["lm_head.weight"], [])
        return model
    save_file(weights, folder / "adapter_model.safetensors")
    adapted: nn.Module = PeftModel.from_pretrained(model, folder)
    return adapted


@pytest.mark.parametrize("name", MODELS)
def test_the_sampler_is_its_own_reference(ranks_llama: str, ranks: Processes, name: str) -> None:
    group = ranks.group(spec_of(ranks_llama, MODELS[name], TRAINERS["1 rank"], reference=SamplerReferenceBlock()))
    pairs = preferences(12)
    filled = group.with_reference(pairs, seed=0, rounds_done=0)
    assert stored_logps(filled) == [-1.25 * len(c.token_ids) for pair in pairs for c in pair.candidates]
    assert len(list(group.train(filled, seed=0))) == 3
    # There is no model of it; KL to the initial policy is told where that costs no second one.
    assert of_reference(group, pairs) == [] and bool(of_initial(group, pairs)) is (name == "lora")


@pytest.mark.parametrize("name", MODELS)
def test_no_reference_for_a_loss_without_one(ranks_llama: str, ranks: Processes, name: str) -> None:
    spec = spec_of(ranks_llama, MODELS[name], TRAINERS["1 rank"], loss=SimpoLossBlock(), reference=NoReferenceBlock())
    group = ranks.group(spec)
    steps = train_round(group, preferences(12))
    assert len(steps) == 3 and all(math.isfinite(step["loss"]) for step in steps)
    assert of_reference(group, PAIRS) == [] and bool(of_initial(group, PAIRS)) is (name == "lora")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
def test_another_model_as_reference(
    ranks_llama: str, other: str, ranks: Processes, name: str, trainer: dict[str, Any]
) -> None:
    reference: ReferenceBlock = ModelReferenceBlock(path=other)
    group = ranks.group(spec_of(ranks_llama, MODELS[name], trainer, reference=reference, reference_folder=other))
    pairs = preferences(6)
    expected = of_model(loaded(other), pairs)
    assert expected != pytest.approx(of_model(loaded(ranks_llama), pairs), abs=SAME)
    assert stored_logps(group.with_reference(pairs, seed=0, rounds_done=0)) == pytest.approx(expected, abs=SAME)
    assert of_policy(group, pairs) == pytest.approx(of_model(loaded(ranks_llama), pairs), abs=SAME)


def test_the_reference_of_a_4_bit_base_is_that_base(ranks_llama: str, ranks: Processes, tmp_path: Path) -> None:
    group = ranks.group(spec_of(ranks_llama, {"lora": LORA, "load_in_4bit": True}, TRAINERS["1 rank"]))
    base = of_model(_saved_whole(group, ranks_llama, tmp_path), HELD_OUT)
    assert of_reference(group, HELD_OUT) == pytest.approx(base, abs=SAME)
    assert base != pytest.approx(of_model(loaded(ranks_llama), HELD_OUT), abs=0.1)
    train_round(group, PAIRS)
    assert of_reference(group, HELD_OUT) == pytest.approx(base, abs=SAME)
    policy = of_model(_saved_whole(group, ranks_llama, tmp_path), HELD_OUT)
    assert of_policy(group, HELD_OUT) == pytest.approx(policy, abs=SAME)
    assert policy != pytest.approx(base, abs=0.1)


def _saved_whole(group: TrainerGroup, base: str, folder: Path) -> nn.Module:
    """What the group would push to generators."""
    return _model_of(_saved(group, "full", folder), "full", base, folder)
