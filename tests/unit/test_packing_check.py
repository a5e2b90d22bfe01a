"""Which models may be packed: those that keep neighbours apart and count positions as they are told."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    MambaConfig,
    MistralConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from raylign.training.logprobs import CompletionLogps
from raylign.training.packing_check import packs_exactly
from raylign.training.sequences import TokenBatch
from tests.unit.tiny_models import GEMMA3_WITH_VISION, IDS, PACKABLE, SMALL, VOCABULARY, build

CPU = torch.device("cpu")
HEADS: dict[str, Any] = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4}


def passes(module: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    return packs_exactly(module, VOCABULARY, CPU, dtype)


@pytest.mark.parametrize("name", PACKABLE)
def test_the_usual_architectures_pass(name: str) -> None:
    assert passes(CompletionLogps(build(PACKABLE[name])))


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(**HEADS, n_embd=32, **IDS),
        GEMMA3_WITH_VISION,
        Qwen3MoeConfig(**SMALL, **IDS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    ],
    ids=lambda config: config.model_type,
)
def test_so_do_others_that_ask_transformers_for_their_attention(config: PreTrainedConfig) -> None:
    assert passes(CompletionLogps(build(config)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_passes(dtype: torch.dtype) -> None:
    assert passes(nn.Module.to(CompletionLogps(build(PACKABLE["llama"])), dtype), dtype)


@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_recomputes_activations_passes(training: bool) -> None:
    model = build(PACKABLE["llama"]).train(training)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert passes(CompletionLogps(model))


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2, **IDS),  # a running state
        BloomConfig(**HEADS, hidden_size=32, **IDS),  # positions by ALiBi, from the mask
        FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **IDS),
        GPTJConfig(**HEADS, n_embd=32, rotary_dim=4, **IDS),  # attention of its own
        PhimoeConfig(**SMALL, **IDS, num_local_experts=4, sliding_window=4),  # a window in the mask alone
    ],
    ids=lambda config: config.model_type,
)
def test_models_with_attention_or_state_of_their_own_do_not_pass(config: PreTrainedConfig) -> None:
    assert not passes(CompletionLogps(build(config)))


class Scripted(nn.Module):
    """Gives token log-probs by a formula of the batch."""

    def __init__(self, formula: Callable[[TokenBatch], Tensor]) -> None:
        super().__init__()
        self._formula = formula

    def forward(self, batch: TokenBatch) -> Any:
        return SimpleNamespace(tokens=SimpleNamespace(logps=self._formula(batch)))


def own(batch: TokenBatch) -> Tensor:
    """Every token by itself."""
    return -batch.labels.float()


def only(packed: bool, batch: TokenBatch, change: Tensor) -> Tensor:
    """`own`, plus the change in packed or in padded rows."""
    return own(batch) + (change if bool(batch.segments) == packed else 0.0)


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (own, True),
        (lambda batch: own(batch) + 1e-7 * batch.input_ids.sum(), False),  # neighbours, however little
        (lambda batch: only(True, batch, torch.tensor(0.01)), False),
        (lambda batch: only(True, batch, torch.tensor(1e-4)), True),
        (lambda batch: only(True, batch, torch.tensor(torch.nan)), False),
        (lambda batch: only(False, batch, torch.tensor(torch.nan)), False),
        (lambda batch: only(False, batch, torch.tensor(torch.inf)), False),
    ],
    ids=["own", "neighbours", "off", "rounding", "NaN when packed", "NaN when padded", "infinite"],
)
def test_the_verdict_by_hand(formula: Callable[[TokenBatch], Tensor], expected: bool) -> None:
    assert passes(Scripted(formula)) == expected


def test_half_precision_may_round_more() -> None:
    module = Scripted(lambda batch: only(True, batch, torch.tensor(0.03)))
    assert [passes(module, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)] == [False, True, True]


def test_a_model_of_nan_does_not_pass() -> None:
    model = build(MistralConfig(**SMALL, **IDS))
    nn.init.constant_(model.get_output_embeddings().weight, torch.nan)
    assert not passes(CompletionLogps(model))
