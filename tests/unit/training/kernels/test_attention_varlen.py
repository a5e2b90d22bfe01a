"""What goes into the one call of a layer, on CPUs: its kernel is for GPUs alone, and has a stand-in of plain masks."""

from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from raylign.training.kernels import attention, attention_varlen
from raylign.training.kernels.attention import attention_for, joined_attention
from raylign.training.kernels.attention_blocked import blocked_attention
from raylign.training.kernels.attention_varlen import gathered, has_varlen, varlen_attention, varlen_index
from raylign.training.logprobs import CompletionLogps
from raylign.training.sequences import Segment
from tests.unit.tiny_models import PACKABLE, build
from tests.unit.training.kernels.test_attention import (
    PACKED,
    SEGMENTS,
    assert_attends_under_a_dense_mask,
    assert_same,
)

CPU, META = torch.device("cpu"), torch.device("meta")


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """FlashAttention 2's masks as its README has them: query i of Q sees the keys from i + K - Q - left to i + K - Q +
    right of K, and -1 is no bound.
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(cu_seq_q) == len(cu_seq_k)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    outputs, longest = [], [0, 0]
    starts = [bounds.tolist() for bounds in (cu_seq_q, cu_seq_k)]
    assert (starts[0][-1], starts[1][-1]) == (len(query), len(key)) and key.shape == value.shape
    for of_queries, of_keys in zip(*(zip(one, one[1:], strict=False) for one in starts), strict=True):
        queries, keys = of_queries[1] - of_queries[0], of_keys[1] - of_keys[0]
        longest = [max(longest[0], queries), max(longest[1], keys)]
        ahead = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        mask = ((ahead <= left) if left >= 0 else (ahead == ahead)) & ((-ahead <= right) if right >= 0 else True)
        q, k, v = (
            part[bounds[0] : bounds[1]].transpose(0, 1)[None]
            for part, bounds in ((query, of_queries), (key, of_keys), (value, of_keys))
        )
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        outputs.append(found[0].transpose(0, 1))
    assert [max_q, max_k] == longest
    return torch.cat(outputs)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_varlen, "varlen_attn", plain_varlen)


def test_the_index_by_hand() -> None:
    """Positions 0 1 | 2 3 | 4, then 5 | 6 7 8 behind an empty completion."""
    index = varlen_index((Segment(0, 2, (2, 1)), Segment(5, 1, (0, 3))), CPU)
    assert index.queries.tolist() == [0, 4, 5, 6, 9] and index.keys.tolist() == [0, 4, 7, 8, 12]
    assert (index.longest_query, index.longest_key) == (4, 4) and index.gather is not None
    assert index.gather.keys.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 5, 6, 7, 8]
    assert index.gather.own.tolist() == [0, 1, 2, 3, 6, 7, 9, 10, 11]
    assert (index.gather.copies.tolist(), index.gather.prompts.tolist()) == ([4, 5, 8], [0, 1, 5])


def test_a_row_of_single_completions_gathers_nothing() -> None:
    index = varlen_index((Segment(0, 2, (2,)), Segment(4, 1, ())), CPU)
    assert index.gather is None and index.queries.tolist() == index.keys.tolist() == [0, 4, 5]


def test_all_layers_of_a_micro_batch_share_one_index() -> None:
    segments = (Segment(0, 2, (2, 1)),)
    assert varlen_index(segments, CPU) is varlen_index((Segment(0, 2, (2, 1)),), CPU)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_one_call_is_attention_under_a_dense_mask(
    key_heads: int, window: int | None, scaling: float | None, groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients too, with keys repeated where PyTorch has no groups."""
    monkeypatch.setattr(attention_varlen, "_HAS_GROUPS", groups)
    assert_attends_under_a_dense_mask(varlen_attention, key_heads, window, scaling)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("name", PACKABLE)
def test_models_give_the_same_as_in_padded_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attention_for", lambda query, value: varlen_attention)
    for layout in PACKED:
        assert_same(CompletionLogps(build(PACKABLE[name])), layout)


def test_gradients_of_a_prompt_are_rounded_once() -> None:
    """256 completions that each ask for 2^-8 of the first's 1: bfloat16 would lose every one of them."""
    index = varlen_index((Segment(0, 3, (1,) * 257),), CPU)
    assert index.gather is not None
    row = torch.zeros(260, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    factors = torch.full((len(index.gather.keys), 1, 1), 2.0**-8, dtype=torch.bfloat16)
    factors[:4] = 1.0
    (gradient,) = torch.autograd.grad(gathered(row, index.gather), row, factors)
    assert gradient.flatten().tolist() == [2.0] * 3 + [1.0] + [2.0**-8] * 256 and gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_the_installed_kernel_takes_what_is_passed(window: int | None, scaling: float | None) -> None:
    """PyTorch's own checks and shapes, forward and backward, on a device without values."""
    assert {"cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size", "enable_gqa"} <= set(
        signature(varlen_attn).parameters
    )
    shapes = [(1, 4, 15, 8), (1, 2, 15, 8), (1, 2, 15, 8)]
    parts = [torch.empty(shape, dtype=torch.bfloat16, device=META, requires_grad=True) for shape in shapes]
    found = varlen_attention(parts[0], parts[1], parts[2], SEGMENTS, scaling, window)
    assert found.shape == (1, 15, 4, 8) and found.dtype == torch.bfloat16
    for gradient, part in zip(torch.autograd.grad(found.sum(), parts), parts, strict=True):
        assert gradient.shape == part.shape


def fake(head: int, of_values: int | None = None, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Queries and values on a GPU that is not there."""
    with FakeTensorMode():
        query = torch.empty(1, 4, 8, head, dtype=dtype, device="cuda")
        return query, torch.empty(1, 2, 8, of_values or head, dtype=dtype, device="cuda")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Its compute capability, and whether PyTorch was built with the kernel."""
    held: dict[str, Any] = {"capability": (9, 0), "built": True}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: held["capability"])
    monkeypatch.setattr(attention_varlen, "is_flash_attention_available", lambda: held["built"])
    return held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [8, 64, 128, 256])
def test_a_gpu_takes_the_one_call(head: int, dtype: torch.dtype, card: dict[str, Any]) -> None:
    assert attention_for(*fake(head, dtype=dtype)) is varlen_attention


@pytest.mark.parametrize(
    ("head", "of_values", "dtype"),
    [
        (64, 64, torch.float32),
        (264, 264, torch.bfloat16),
        (20, 20, torch.bfloat16),
        (192, 128, torch.bfloat16),
    ],
)
def test_what_the_kernel_lacks_goes_piece_by_piece(
    head: int, of_values: int, dtype: torch.dtype, card: dict[str, Any]
) -> None:
    assert attention_for(*fake(head, of_values, dtype)) is joined_attention


@pytest.mark.parametrize(
    ("capability", "narrow", "wide"),
    [((7, 5), False, False), ((8, 0), True, True), ((8, 6), True, False), ((8, 9), True, False)]
    + [((9, 0), True, True), ((10, 0), True, True), ((12, 0), True, False)],
)
def test_cards_differ(capability: tuple[int, int], narrow: bool, wide: bool, card: dict[str, Any]) -> None:
    card["capability"] = capability
    assert (has_varlen(*fake(128)), has_varlen(*fake(256))) == (narrow, wide)


def test_a_pytorch_without_the_kernel_or_its_masks_has_none(
    card: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    card["built"] = False
    assert not has_varlen(*fake(64))
    card["built"] = True
    monkeypatch.setattr(attention_varlen, "_HAS_MASKS", False)
    assert not has_varlen(*fake(64))


def test_cpus_keep_their_own() -> None:
    query = torch.empty(1, 4, 8, 64, dtype=torch.bfloat16)
    assert attention_for(query, query) is blocked_attention
