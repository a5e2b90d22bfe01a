"""Completion log-probabilities of tiny models against the plain formula on full logits."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from raylign.errors import ModelError
from raylign.training.batches import TokenPair, pad_sequences
from raylign.training.logprobs import CompletionLogps, CompletionScores

VOCABULARY = 50
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PAIRS: list[TokenPair] = [((3, 4, 5), (6, 7)), ((8,), (9, 10, 11)), ((1, 2, 3, 4), (5,)), ((6, 7), ())]


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with weights large enough that every logit differs."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def tiny(tied: bool = False) -> PreTrainedModel:
    return build(LlamaConfig(**SMALL, **IDS, tie_word_embeddings=tied))


def plain(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
    """log p(completion[t] | what stands before), from this model's own logits of this one unpadded row, in float64."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
    table = logits.log_softmax(-1)
    return [float(table[len(prompt) + t - 1, token]) for t, token in enumerate(completion)]


def scores(model: nn.Module, pairs: Sequence[TokenPair], pad_id: int = 0) -> CompletionScores:
    found: CompletionScores = CompletionLogps(model)(pad_sequences(pairs, pad_id))
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_equal_the_plain_formula(tied: bool, dtype: torch.dtype) -> None:
    model = nn.Module.to(tiny(tied), dtype)
    expected = [plain(model, *pair) for pair in PAIRS]
    found = scores(model, PAIRS)
    assert found.logps.tolist() == pytest.approx([sum(row) for row in expected], rel=1e-5)
    assert found.token_logps.tolist() == pytest.approx([logp for row in expected for logp in row], rel=1e-4, abs=1e-5)
    assert found.rows.tolist() == [0, 0, 1, 1, 1, 2]
    assert found.logps.dtype == torch.float32 and found.logps.requires_grad and not found.token_logps.requires_grad


def test_equal_logits_make_every_token_minus_log_v() -> None:
    model = tiny()
    nn.init.zeros_(model.get_output_embeddings().weight)
    assert scores(model, PAIRS).logps.tolist() == pytest.approx([-n * math.log(VOCABULARY) for n in (2, 3, 1, 0)])


def test_a_head_that_ignores_the_text_by_hand() -> None:
    """With weights of 0 the bias alone speaks: token k has the logit ln (k + 1), so p(k) = (k + 1) / 1275."""
    model = tiny()
    head = nn.Linear(32, VOCABULARY)
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.arange(1, VOCABULARY + 1).log())
    model.set_output_embeddings(head)
    total = VOCABULARY * (VOCABULARY + 1) / 2
    found = scores(model, [((9, 9), (0, 4)), ((7,), (49,))])
    assert found.logps.tolist() == pytest.approx([math.log(1 / total) + math.log(5 / total), math.log(50 / total)])
    # The likeliest token is always 49.
    assert found.correct.tolist() == [False, False, True]
    assert found.mean_logits.tolist() == pytest.approx([math.lgamma(51) / 50] * 3, rel=1e-5)
    entropy = -sum(k / total * math.log(k / total) for k in range(1, 51))
    assert found.entropies.tolist() == pytest.approx([entropy] * 3, rel=1e-5)


def test_neither_padding_nor_neighbours_matter() -> None:
    model = tiny()
    together = scores(model, PAIRS)
    alone = [scores(model, [pair]).logps.item() for pair in PAIRS[:3]]
    wide = scores(model, [*PAIRS, ((1,) * 20, (2,) * 9)]).logps[:4]
    assert together.logps.tolist() == pytest.approx([*alone, 0.0], rel=1e-5)
    assert wide.tolist() == pytest.approx(together.logps.tolist(), rel=1e-5)
    assert scores(model, PAIRS, pad_id=7).logps.tolist() == pytest.approx(together.logps.tolist(), rel=1e-5)


def test_prompt_tokens_are_never_counted() -> None:
    """The last prompt token moves from the prompt to the completion: its log-probability, and no more, is added."""
    model = tiny()
    short, long = scores(model, [((3, 4, 5), (6, 7))]), scores(model, [((3, 4), (5, 6, 7))])
    assert long.logps.item() - short.logps.item() == pytest.approx(plain(model, (3, 4), (5,))[0], rel=1e-4)
    assert long.token_logps[1:].tolist() == pytest.approx(short.token_logps.tolist(), rel=1e-4)


def test_empty_completions_give_0() -> None:
    found = scores(tiny(), [((3, 4), ()), ((5,), ())])
    assert found.logps.tolist() == [0.0, 0.0] and found.token_logps.shape == (0,)


def test_gradients_are_those_of_the_plain_formula() -> None:
    model = tiny(tied=True).double()
    row = torch.tensor([[3, 4, 5, 6, 7]])
    table = model(input_ids=row).logits[0].log_softmax(-1)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(table[2, 6] + table[3, 7], weights)
    found = torch.autograd.grad(scores(model, [((3, 4, 5), (6, 7))]).logps.sum(), weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_counts_when_on_and_not_when_off() -> None:
    model = tiny(tied=True)
    base = scores(model, PAIRS).logps.tolist()
    adapted: PeftModel = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    wrapped = CompletionLogps(adapted)
    assert scores(adapted, PAIRS).logps.tolist() == pytest.approx(base, rel=1e-6)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.5)
    on = wrapped(pad_sequences(PAIRS, 0)).logps.tolist()
    assert on == pytest.approx([sum(plain(adapted, *pair)) for pair in PAIRS], rel=1e-5)
    assert abs(on[0] - base[0]) > 0.1
    with adapted.disable_adapter():
        assert wrapped(pad_sequences(PAIRS, 0)).logps.tolist() == pytest.approx(base, rel=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, **IDS),
        GPTNeoXConfig(**{key: SMALL[key] for key in SMALL if key != "num_key_value_heads"}, **IDS),
        OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=16, **IDS
        ),
        Qwen3Config(**SMALL, **IDS, head_dim=8),
        Gemma3TextConfig(**SMALL, **IDS, head_dim=8),
        GraniteConfig(**SMALL, **IDS, logits_scaling=1.0),
        CohereConfig(**SMALL, **IDS, logit_scale=1.0),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_equal_their_own_logits(config: PreTrainedConfig) -> None:
    model = build(config)
    assert scores(model, PAIRS).logps.tolist() == pytest.approx([sum(plain(model, *pair)) for pair in PAIRS], rel=1e-4)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Gemma2Config(**SMALL, **IDS, head_dim=8), r"'gemma2' sets final_logit_softcapping=30\.0"),
        (CohereConfig(**SMALL, **IDS), r"'cohere' sets logit_scale=0\.0625"),
        (GraniteConfig(**SMALL, **IDS, logits_scaling=8.0), r"'granite' sets logits_scaling=8\.0"),
    ],
    ids=["gemma2", "cohere", "granite"],
)
def test_heads_that_rescale_logits_are_refused(config: PreTrainedConfig, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        CompletionLogps(build(config))


def rescaling_unseen() -> list[PreTrainedConfig]:
    heads: dict[str, Any] = {"head_dim": 8, "global_head_dim": 8}
    text = Gemma4TextConfig(
        **SMALL,
        **IDS,
        **heads,
        final_logit_softcapping=0.5,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    tokens: dict[str, Any] = {"image_token_id": 45, "boi_token_id": 46, "eoi_token_id": 47, "audio_token_id": 48}
    mamba: dict[str, Any] = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    return [
        Gemma4Config(text_config=text, vision_config=None, audio_config=None, **tokens),
        FalconH1Config(**SMALL, **IDS, **mamba, lm_head_multiplier=0.1),
        RecurrentGemmaConfig(**SMALL, **IDS, lru_width=32, logits_soft_cap=0.5),
    ]


@pytest.mark.parametrize("config", rescaling_unseen(), ids=lambda config: config.model_type)
def test_every_head_that_rescales_logits_is_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(ModelError):
        CompletionLogps(build(config))
