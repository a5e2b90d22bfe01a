"""Rotary frequencies that change with length: every sequence gets its own, or nothing starts."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config, PreTrainedConfig

from raylign.config.blocks import ModelBlock
from raylign.errors import ConfigError, ModelError
from raylign.models import context_limit, require_context
from raylign.models.open import switch_length
from raylign.records import Completions
from raylign.training.logprobs import CompletionLogps
from raylign.training.sequences import Layout, token_batch
from tests.unit.tiny_models import IDS, SMALL, build, plain

ORIGINAL = 32
SWITCH: dict[str, Any] = {"original_max_position_embeddings": ORIGINAL, "max_position_embeddings": 128}
PHI3 = Phi3Config(
    **SMALL,
    **IDS,
    **SWITCH,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "original_max_position_embeddings": ORIGINAL,
    },
)
DYNAMIC = LlamaConfig(
    **SMALL,
    **IDS,
    max_position_embeddings=ORIGINAL,
    rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
)
LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")
SHORT = Completions(tuple(range(3, 13)), ((20, 21, 22, 23, 24),))


def beside(length: int) -> Completions:
    """A sequence of `length` tokens."""
    return Completions((4, 5, 6), (tuple(7 + i % 40 for i in range(length - 3)),))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", [PHI3, DYNAMIC], ids=["longrope", "dynamic"])
def test_a_sequence_has_the_log_probs_that_it_has_alone(config: PreTrainedConfig, layout: Layout) -> None:
    """Beside the longest that a run may have, and after it; transformers' own of the row alone."""
    model = build(config)
    expected = plain(model, SHORT.prompt, SHORT.completions[0])
    module = CompletionLogps(deepcopy(model))
    for groups in ([SHORT], [SHORT, beside(ORIGINAL)], [SHORT]):
        found = module(token_batch(groups, layout, 0)).tokens.logps[:5]
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("config", [PHI3, DYNAMIC], ids=["longrope", "dynamic"])
def test_transformers_gives_another_answer_beside_a_longer_one(config: PreTrainedConfig) -> None:
    """Or else the refusals here would be for nothing."""
    model = build(config)
    alone = plain(model, SHORT.prompt, SHORT.completions[0])
    rows = [[*group.prompt, *group.completions[0]] for group in (SHORT, beside(ORIGINAL + 1))]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[0].double().log_softmax(-1)
    found = [float(logits[9 + t, token]) for t, token in enumerate(SHORT.completions[0])]
    assert found != pytest.approx(alone, abs=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", [PHI3, DYNAMIC], ids=["longrope", "dynamic"])
def test_a_longer_one_is_refused_in_every_layout(config: PreTrainedConfig, layout: Layout) -> None:
    module = CompletionLogps(build(config))
    with pytest.raises(ModelError, match="longer than the 32 tokens up to which .* keeps its rotary frequencies"):
        module(token_batch([SHORT, beside(ORIGINAL + 1)], layout, 0))


@pytest.mark.parametrize(("config", "limit"), [(PHI3, ORIGINAL), (DYNAMIC, ORIGINAL)], ids=["longrope", "dynamic"])
def test_runs_go_no_further(config: PreTrainedConfig, limit: int, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    assert context_limit(str(tmp_path)) == limit
    require_context("data.max_length", limit, str(tmp_path), ModelBlock())
    with pytest.raises(ConfigError, match=rf"data\.max_length={limit + 1} exceeds the {limit} .*; lower it"):
        require_context("data.max_length", limit + 1, str(tmp_path), ModelBlock())


def test_the_refusal_says_why(tmp_path: Path) -> None:
    PHI3.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"exceeds the 32 tokens up to which rotary frequencies stay the same"):
        require_context("generators.max_model_len", 64, str(tmp_path), ModelBlock())


def test_a_longrope_for_one_kind_of_layer_counts() -> None:
    ropes = {"full_attention": PHI3.rope_parameters, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert switch_length(Gemma3TextConfig(**SMALL, head_dim=8, rope_parameters=ropes)) == ORIGINAL
    assert switch_length(LlamaConfig(**SMALL)) is None
