"""Packed rows against padded ones and against a dense mask: the same log-probs, the same gradients."""

from collections.abc import Callable, Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DeepseekV3Config

from raylign.records import Completions
from raylign.training.kernels.attention import joined_attention, packed_attention
from raylign.training.kernels.attention_blocked import blocked_attention
from raylign.training.logprobs import CompletionLogps
from raylign.training.sequences import Layout, Segment, TokenBatch, token_batch
from tests.unit.tiny_models import IDS, PACKABLE, SMALL, WINDOW, build

PACKED: list[Layout] = ["shared", "packed"]
GROUPS = [
    Completions((3, 4, 5, 6, 7), ((6, 7, 8), (9,), (10, 11, 12, 13, 14, 15))),
    Completions((8, 9), ((), (9, 10, 11, 12, 13, 14, 15, 16), (17, 18))),
]
"""Sequences of 2 to 11 tokens: shorter and longer than the window."""

# Two prompts of 3 and 2 tokens; the first has three completions, the second an empty one and one of 4 tokens.
SEGMENTS = (Segment(0, 3, (2, 1, 3)), Segment(9, 2, (0, 4)))
OWNER = [0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 4, 5, 5, 5, 5]
"""Who a token belongs to: a prompt (0, 4) or a completion."""
PROMPT_OF = {0: 0, 1: 0, 2: 0, 3: 0, 4: 4, 5: 4}
POSITION = [0, 1, 2, 3, 4, 3, 3, 4, 5, 0, 1, 2, 3, 4, 5]


Attention = Callable[[Tensor, Tensor, Tensor, Sequence[Segment], float | None, int | None], Tensor]


def dense_mask(window: int | None) -> Tensor:
    """[15, 15]: a token sees itself, its own before it and its prompt, no further back than the window."""
    rows = [[_sees(query, key, window) for key in range(15)] for query in range(15)]
    return torch.tensor(rows)


def _sees(query: int, key: int, window: int | None) -> bool:
    mine = OWNER[key] in (OWNER[query], PROMPT_OF[OWNER[query]])
    back = POSITION[query] - POSITION[key]
    return mine and back >= 0 and (window is None or back < window)


def assert_attends_under_a_dense_mask(
    attention: Attention, key_heads: int, window: int | None, scaling: float | None
) -> None:
    """`attention` over `SEGMENTS` is PyTorch's under that mask, gradients included."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 15, 8), (1, key_heads, 15, 8), (1, key_heads, 15, 8)]
    query, key, value = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)
    found = attention(query, key, value, SEGMENTS, scaling, window)
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=dense_mask(window), scale=scaling, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    factors = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((output * factors).sum(), (query, key, value)) for output in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("attention", [joined_attention, blocked_attention])
def test_a_packed_row_is_attention_under_a_dense_mask(
    attention: Attention, key_heads: int, window: int | None, scaling: float | None
) -> None:
    """Gradients too: those of a prompt's keys and values add up over its completions."""
    assert_attends_under_a_dense_mask(attention, key_heads, window, scaling)


@pytest.mark.parametrize("window", [None, 100, 300])
def test_a_backward_pass_in_blocks_is_one_in_a_piece(window: int | None) -> None:
    """Prompts and completions of up to three blocks of queries, in bfloat16, against fp64 under a dense mask."""
    segments = (Segment(0, 300, (290, 520)), Segment(1110, 5, (700,)))
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 1815, 16), (1, 2, 1815, 16), (1, 2, 1815, 16), (1, 1815, 4, 16)]
    query, key, value, factors = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)

    def gradients(attention: Attention, dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v = (part.to(dtype).requires_grad_() for part in (query, key, value))
        return torch.autograd.grad((attention(q, k, v, segments, None, window) * factors).sum(), (q, k, v))

    found, expected = gradients(blocked_attention, torch.bfloat16), gradients(joined_attention, torch.float64)
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() < 0.01 * other.norm()


def test_a_prompt_gets_the_sum_of_the_gradients_of_its_completions() -> None:
    """Each completion alone, in a row of its own, against all of them behind one prompt."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 8, generator=generator, requires_grad=True) for _ in range(3))

    def prompt_gradient(tokens: Sequence[int], lengths: tuple[int, ...]) -> Tensor:
        queries, keys, values = (part[:, :, list(tokens)] for part in (query, key, value))
        output, weights = packed_attention(
            nn.Module(), queries, keys, values, None, segments=(Segment(0, 3, lengths),), dropout=0.0
        )
        assert weights is None
        (gradient,) = torch.autograd.grad((output[:, 3:] ** 2).sum(), key)
        return gradient[:, :, :3]

    alone = [prompt_gradient((0, 1, 2, *own), (len(own),)) for own in ((3, 4), (5,), (6, 7, 8))]
    together = prompt_gradient(range(9), (2, 1, 3))
    torch.testing.assert_close(together, torch.stack(alone).sum(0))


def losses_and_gradients(module: nn.Module, batch: TokenBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Token log-probs, and the gradients of a sum with a different factor for each completion."""
    scores = module(batch)
    total = (scores.logps * torch.linspace(-1.0, 2.0, batch.completions)).sum() + scores.tokens.entropies.sum()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return scores.tokens.logps.detach(), torch.autograd.grad(total, trained)


def assert_same(module: nn.Module, layout: Layout) -> None:
    expected = losses_and_gradients(module, token_batch(GROUPS, "padded", 0))
    found = losses_and_gradients(module, token_batch(GROUPS, layout, 0))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(1.0, other.abs().max().item()))


def test_values_may_be_of_another_size_than_keys() -> None:
    """As in multi-head latent attention."""
    config = DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4},
        **IDS,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_group=1,
        topk_group=1,
        n_routed_experts=4,
        first_k_dense_replace=2,
    )
    assert_same(CompletionLogps(build(config)), "shared")


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("name", PACKABLE)
def test_packed_rows_equal_padded_rows(name: str, layout: Layout) -> None:
    assert_same(CompletionLogps(build(PACKABLE[name])), layout)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_recomputed_activations_change_nothing(name: str) -> None:
    model = build(PACKABLE[name]).train()
    batch = token_batch(GROUPS, "shared", 0)
    logps, kept = losses_and_gradients(CompletionLogps(model), batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, recomputed = losses_and_gradients(CompletionLogps(model), batch)
    assert model.is_gradient_checkpointing and torch.equal(logps, again)
    torch.testing.assert_close(recomputed, kept)
    assert_same(CompletionLogps(model), "shared")


@pytest.mark.parametrize("name", PACKABLE)
def test_adapters_equal_too_on_and_off(name: str) -> None:
    model = build(PACKABLE[name])
    base = CompletionLogps(build(PACKABLE[name]))(token_batch(GROUPS, "padded", 0)).tokens.logps
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for parameter_name, parameter in adapted.named_parameters():
        if ".lora_B." in parameter_name:
            nn.init.normal_(parameter, std=0.2)
    module = CompletionLogps(adapted)
    assert_same(module, "shared")
    with adapted.disable_adapter():
        off = module(token_batch(GROUPS, "shared", 0)).tokens.logps
    torch.testing.assert_close(off, base, rtol=1e-4, atol=1e-4)
    assert (module(token_batch(GROUPS, "shared", 0)).tokens.logps - base).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_the_window_matters_here(name: str) -> None:
    """Or else the tests above would say nothing about windows."""
    narrow, wide = build(PACKABLE[name]), build(PACKABLE[name])
    wide.config.sliding_window = 1000
    for module in wide.modules():
        if getattr(module, "sliding_window", None) == WINDOW:
            module.__dict__["sliding_window"] = 1000
    batch = token_batch(GROUPS, "shared", 0)
    gap = CompletionLogps(narrow)(batch).logps - CompletionLogps(wide)(batch).logps
    assert gap.abs().max() > 0.1
