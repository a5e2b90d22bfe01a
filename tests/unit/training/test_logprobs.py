"""Completion log-probabilities of tiny models against the plain formula on full logits."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma4Config,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    OPTConfig,
    PreTrainedConfig,
    RecurrentGemmaConfig,
)

from raylign.errors import ModelError
from raylign.records import Completions
from raylign.training.logprobs import CompletionLogps
from raylign.training.sequences import Layout, token_batch
from tests.unit.tiny_models import (
    GEMMA3_WITH_VISION,
    IDS,
    PACKABLE,
    SMALL,
    VOCABULARY,
    build,
    plain,
    plain_sums,
    scores,
    tiny,
)

LAYOUTS: list[Layout] = ["shared", "packed", "padded"]
GROUPS = [
    Completions((3, 4, 5), ((6, 7), (6, 8, 9, 10))),
    Completions((8,), ((9, 10, 11),)),
    Completions((1, 2, 3, 4), ((5,), (), (6,))),
]
LENGTHS = [2, 4, 3, 1, 0, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_equal_the_plain_formula(tied: bool, dtype: torch.dtype, layout: Layout) -> None:
    model = nn.Module.to(tiny(tied), dtype)
    tokens = [logp for group in GROUPS for c in group.completions for logp in plain(model, group.prompt, c)]
    found = scores(model, GROUPS, layout)
    assert found.logps.tolist() == pytest.approx(plain_sums(model, GROUPS), rel=1e-5)
    assert found.tokens.logps.tolist() == pytest.approx(tokens, rel=1e-4, abs=1e-5)
    assert found.owners.tolist() == [owner for owner, length in enumerate(LENGTHS) for _ in range(length)]
    assert found.logps.dtype == torch.float32 and found.logps.requires_grad and found.tokens.logps.requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_logits_make_every_token_minus_log_v(layout: Layout) -> None:
    model = tiny()
    nn.init.zeros_(model.get_output_embeddings().weight)
    expected = [-length * math.log(VOCABULARY) for length in LENGTHS]
    assert scores(model, GROUPS, layout).logps.tolist() == pytest.approx(expected)


def test_a_head_that_ignores_the_text_by_hand() -> None:
    """With weights of 0 the bias alone speaks: token k has the logit ln (k + 1), so p(k) = (k + 1) / 1275."""
    model = tiny()
    head = nn.Linear(32, VOCABULARY)
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.arange(1, VOCABULARY + 1).log())
    model.set_output_embeddings(head)
    total = VOCABULARY * (VOCABULARY + 1) / 2
    found = scores(model, [Completions((9, 9), ((0, 4),)), Completions((7,), ((49,),))])
    assert found.logps.tolist() == pytest.approx([math.log(1 / total) + math.log(5 / total), math.log(50 / total)])
    # The likeliest token is always 49.
    assert found.tokens.correct.tolist() == [0, 0, 1]
    assert found.tokens.mean_logits.tolist() == pytest.approx([math.lgamma(51) / 50] * 3, rel=1e-5)
    entropy = -sum(k / total * math.log(k / total) for k in range(1, 51))
    assert found.tokens.entropies.tolist() == pytest.approx([entropy] * 3, rel=1e-5)


def test_token_weights_scale_each_token_of_a_sum() -> None:
    """Also the gradient: that of a weighted sum is the weighted sum of the gradients."""
    model = CompletionLogps(tiny())
    batch = token_batch([Completions((3, 4), ((5, 6), (7,)))], "shared", 0)
    found, tokens = model(batch, torch.tensor([1.0, 0.25, 0.0])).logps, model(batch).tokens.logps
    assert found.tolist() == pytest.approx([(tokens[0] + 0.25 * tokens[1]).item(), 0.0])
    weights = list(model.parameters())
    gradients = torch.autograd.grad(found.sum(), weights)
    torch.testing.assert_close(gradients, torch.autograd.grad(tokens[0] + 0.25 * tokens[1], weights))


def test_padding_does_not_matter() -> None:
    model = tiny()
    together = scores(model, GROUPS).logps
    alone = [scores(model, [Completions(g.prompt, (c,))]).logps.item() for g in GROUPS for c in g.completions]
    wide = scores(model, [*GROUPS, Completions((1,) * 20, ((2,) * 9,))]).logps[:6]
    assert together.tolist() == pytest.approx(alone, rel=1e-5)
    assert wide.tolist() == pytest.approx(together.tolist(), rel=1e-5)
    assert scores(model, GROUPS, pad_id=7).logps.tolist() == pytest.approx(together.tolist(), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompt_tokens_are_never_counted(layout: Layout) -> None:
    """The last prompt token moves from the prompt to the completion: its log-probability, and no more, is added."""
    model = tiny()
    short = scores(model, [Completions((3, 4, 5), ((6, 7),))], layout)
    long = scores(model, [Completions((3, 4), ((5, 6, 7),))], layout)
    assert long.logps.item() - short.logps.item() == pytest.approx(plain(model, (3, 4), (5,))[0], rel=1e-4)
    assert long.tokens.logps[1:].tolist() == pytest.approx(short.tokens.logps.tolist(), rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_completions_give_0(layout: Layout) -> None:
    found = scores(tiny(), [Completions((3, 4), ((),)), Completions((5,), ((), ()))], layout)
    assert found.logps.tolist() == [0.0, 0.0, 0.0] and found.tokens.logps.shape == (0,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_plain_formula(layout: Layout) -> None:
    model = tiny(tied=True).double()
    table = model(input_ids=torch.tensor([[3, 4, 5, 6, 7]])).logits[0].log_softmax(-1)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(table[2, 6] + table[3, 7], weights)
    batch = token_batch([Completions((3, 4, 5), ((6, 7),))], layout, 0)
    found = torch.autograd.grad(CompletionLogps(model)(batch).logps.sum(), weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_counts_when_on_and_not_when_off(layout: Layout) -> None:
    model = tiny(tied=True)
    base = plain_sums(model, GROUPS)
    adapted: PeftModel = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    assert scores(adapted, GROUPS, layout).logps.tolist() == pytest.approx(base, rel=1e-5)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.5)
    on = plain_sums(adapted, GROUPS)
    wrapped, batch = CompletionLogps(adapted), token_batch(GROUPS, layout, 0)
    assert wrapped(batch).logps.tolist() == pytest.approx(on, rel=1e-5)
    assert abs(on[0] - base[0]) > 0.1
    with adapted.disable_adapter():
        assert wrapped(batch).logps.tolist() == pytest.approx(base, rel=1e-5)


OTHERS = [
    GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, **IDS),
    GPTNeoXConfig(**{key: SMALL[key] for key in SMALL if key != "num_key_value_heads"}, **IDS),
    OPTConfig(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=16, **IDS),
    GraniteConfig(**SMALL, **IDS, logits_scaling=1.0),
    CohereConfig(**SMALL, **IDS, logit_scale=1.0),
    GEMMA3_WITH_VISION,
]


@pytest.mark.parametrize("config", [*OTHERS, *PACKABLE.values()], ids=lambda config: config.model_type)
def test_every_architecture_equals_its_own_logits(config: PreTrainedConfig) -> None:
    model = build(config)
    assert scores(model, GROUPS).logps.tolist() == pytest.approx(plain_sums(model, GROUPS), rel=1e-4)


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
