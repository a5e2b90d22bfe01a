"""Which layouts are exact: those that give what transformers' own eager forward gives for a sequence alone."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from raylign.errors import ModelError
from raylign.records import Completions
from raylign.training import layout_check
from raylign.training.backbone import PaddedAttention, inner_model
from raylign.training.kernels.attention import packed_attention
from raylign.training.layout_check import compare, supported_layout
from raylign.training.logprobs import CompletionLogps
from raylign.training.rewards import CompletionRewards
from raylign.training.sequences import Layout, Segment, TokenBatch, token_batch
from tests.unit.tiny_models import GEMMA3_WITH_VISION, IDS, PACKABLE, SMALL, VOCABULARY, build, tiny

CPU = torch.device("cpu")
HEADS: dict[str, Any] = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4}


def passes(module: Any, layout: Layout = "shared") -> bool:
    return compare(module, layout, CPU).exact


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
    """It is compared in float32, whatever the weights are stored in."""
    verdict = compare(nn.Module.to(CompletionLogps(build(PACKABLE["llama"])), dtype), "shared", CPU)
    assert verdict.exact and verdict.gap < 1e-4


class WrongInHalf(CompletionLogps):
    """Right in float32, as a kernel for bf16 alone would be that reads the wrong keys."""

    def forward(self, batch: TokenBatch, weights: Tensor | None = None) -> Any:
        found = super().forward(batch, weights)
        embedded = inner_model(self.model).get_input_embeddings()(batch.input_ids)
        off = 0.0 if embedded.dtype == torch.float32 else 0.5
        return found._replace(tokens=found.tokens._replace(logps=found.tokens.logps - off))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_where_a_dtype_has_kernels_of_its_own_it_is_compared_too(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = (nn.Module.to(kind(build(PACKABLE["qwen3"])), dtype) for kind in (CompletionLogps, WrongInHalf))
    assert supported_layout([right, wrong], "shared", CPU) == "shared"
    monkeypatch.setattr(layout_check, "has_kernels_of_its_own", lambda device, dtype: dtype != torch.float32)
    assert supported_layout([right], "shared", CPU) == "shared"
    with pytest.raises(ModelError, match="rows differ from transformers' own by 0[.]"):
        supported_layout([wrong], "shared", CPU)


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
    """Gives token log-probs by a formula of the batch, and those of a row alone by `own`."""

    def __init__(self, formula: Callable[[TokenBatch], Tensor]) -> None:
        super().__init__()
        self.model: nn.Module = tiny()
        self.padded_attention: PaddedAttention = "sdpa"
        self._formula = formula

    def forward(self, batch: TokenBatch) -> Any:
        return SimpleNamespace(tokens=SimpleNamespace(logps=self._formula(batch)))

    def own_values(self, prompt: Sequence[int], completion: Sequence[int], device: torch.device) -> Tensor:
        return own(token_batch([Completions(prompt, [completion])], "padded", 0))


def own(batch: TokenBatch) -> Tensor:
    """Every token by itself."""
    return -batch.labels.float()


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (own, True),
        (lambda batch: own(batch) + 1e-7 * batch.input_ids.sum(), False),  # neighbours, however little
        (lambda batch: own(batch) + 0.01, False),
        (lambda batch: own(batch) + 1e-4, True),
        (lambda batch: own(batch) * torch.nan, False),
        (lambda batch: own(batch) * torch.inf, False),
    ],
    ids=["own", "neighbours", "off", "rounding", "NaN", "infinite"],
)
def test_the_verdict_by_hand(formula: Callable[[TokenBatch], Tensor], expected: bool, layout: Layout) -> None:
    assert passes(Scripted(formula), layout) == expected


def test_what_stands_before_counts_as_a_neighbour() -> None:
    """A convolution or a state carries on from one sequence of a row to the next."""
    leak = Scripted(lambda batch: own(batch) + 1e-7 * batch.input_ids[0, 0] * (batch.owners > 0))
    assert not passes(leak) and "neighbours" in compare(leak, "shared", CPU).reason


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_is_not_finite_is_refused(value: float) -> None:
    model = build(MistralConfig(**SMALL, **IDS))
    nn.init.constant_(model.get_output_embeddings().weight, value)
    with pytest.raises(ModelError, match="'mistral' gives what .* neither packed nor padded: .* not finite"):
        supported_layout([CompletionLogps(model)], "shared", CPU)


MOE = Qwen2MoeConfig(
    **SMALL,
    **IDS,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    use_sliding_window=True,
    sliding_window=16,
    layer_types=["sliding_attention", "full_attention"],
)
LFM2 = Lfm2Config(**SMALL, **IDS, layer_types=["conv", "full_attention"])


@pytest.mark.parametrize("config", [MOE, LFM2], ids=lambda config: config.model_type)
@pytest.mark.parametrize("window", [16, 4096])
def test_what_packed_rows_leave_out_is_trained_padded(config: PreTrainedConfig, window: int) -> None:
    """A window that the attention is not told, however wide, and a convolution over the row."""
    config = deepcopy(config)
    config.sliding_window = window
    module = CompletionLogps(build(config))
    assert supported_layout([module], "shared", CPU) == "padded"
    widths = {getattr(layer, "sliding_window", None) for layer in module.modules()}
    assert widths <= {window, None} and inner_model(module.model).config.sliding_window == window


def test_a_window_past_the_longest_sequence_is_none() -> None:
    config = deepcopy(MOE)
    config.sliding_window = config.max_position_embeddings = 512
    assert passes(CompletionLogps(build(config)))


GEMMA2 = Gemma2Config(**SMALL, **IDS, head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=None)


def test_soft_capped_attention_is_transformers_eager_one_on_padded_rows() -> None:
    """Rows that need it: with PyTorch's attention the rewards are others."""
    config = deepcopy(GEMMA2)
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    groups = [Completions((5, 6, 7), ((8, 9, 4), (4, 3))), Completions((3,), ((9, 11, 12, 13),))]
    batch = token_batch(groups, "padded", 0)
    module = CompletionRewards(deepcopy(model))
    off = module(batch)
    assert supported_layout([module], "shared", CPU) == "padded" and module.padded_attention == "eager"
    model.set_attn_implementation("eager")
    rows = [[*group.prompt, *ids] for group in groups for ids in group.completions]
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(module(batch), expected, atol=1e-5, rtol=0)
    assert (off - expected).abs().max() > 0.01


def test_a_head_with_more_than_a_linear_layer_is_refused() -> None:
    """BERT puts a layer and a norm between its hidden states and its logits."""
    config = BertConfig(**{name: SMALL[name] for name in SMALL if name != "num_key_value_heads"}, is_decoder=True)
    with pytest.raises(ModelError, match=r"'bert' gives what .* neither packed nor padded: padded rows differ"):
        supported_layout([CompletionLogps(build(config))], "shared", CPU)


def test_a_model_that_looks_ahead_is_refused() -> None:
    class Ahead(Scripted):
        def own_values(self, prompt: Sequence[int], completion: Sequence[int], device: torch.device) -> Tensor:
            return super().own_values(prompt, completion, device) + 0.01 * completion[-1]

    with pytest.raises(ModelError, match="depend on later tokens: it is no causal language model"):
        supported_layout([Ahead(own)], "padded", CPU)


def test_a_second_model_counts_too() -> None:
    """The reference may be of another architecture, and both score in the same rows."""
    modules = [CompletionLogps(build(PACKABLE["llama"])), CompletionLogps(build(GEMMA2))]
    assert supported_layout(modules, "shared", CPU) == "padded"
    assert [module.padded_attention for module in modules] == ["sdpa", "eager"]


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = build(PACKABLE["gemma3"]).train().bfloat16()
    module = CompletionLogps(model)
    layers = {name: {key: id(value) for key, value in vars(layer).items()} for name, layer in model.named_modules()}
    weights = deepcopy(model.state_dict())
    supported_layout([module], "shared", CPU)
    assert all(layer.training for layer in model.modules())
    assert {
        name: {key: id(value) for key, value in vars(layer).items()} for name, layer in model.named_modules()
    } == layers
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias", "anything"])
def test_attention_over_packed_rows_refuses_what_it_does_not_know(option: str) -> None:
    query, key, value = (torch.randn(1, 2, 9, 8) for _ in range(3))
    segments = (Segment(0, 3, (2, 4)),)
    given: dict[str, Any] = {option: None, "use_cache": False}
    packed_attention(nn.Module(), query, key, value, None, segments=segments, **given)
    given = {option: 30.0}
    with pytest.raises(TypeError, match=f"packed rows know no attention with {option}"):
        packed_attention(nn.Module(), query, key, value, None, segments=segments, **given)


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"is_causal": False}])
def test_it_has_no_dropout_and_is_causal(options: dict[str, Any]) -> None:
    query, key, value = (torch.randn(1, 2, 9, 8) for _ in range(3))
    with pytest.raises(TypeError, match="packed rows know no attention with"):
        packed_attention(nn.Module(), query, key, value, None, segments=(Segment(0, 3, (2, 4)),), **options)
