"""The kernels that GPUs alone have, against plain masks and full logits; they need one GPU and a minute."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from raylign.training.kernels import head
from raylign.training.kernels.attention import attention_for, joined_attention
from raylign.training.kernels.attention_varlen import has_varlen, varlen_attention
from raylign.training.kernels.head import TokenScores, linear_scores
from raylign.training.sequences import Segment, on_device
from tests.unit.training.kernels.test_head import Inputs, gradients, plain

pytestmark = pytest.mark.gpu

SEGMENTS = (Segment(0, 300, (290, 520, 1, 33)), Segment(1144, 5, (700,)), Segment(1849, 40, (0, 60)))
LENGTH = 1949


def mask_of(segments: tuple[Segment, ...], window: int | None) -> Tensor:
    """[T, T]: a token sees itself, its own before it and its prompt, no further back than the window."""
    owner: list[int] = []
    prompt_of: dict[int, int] = {}
    position: list[int] = []
    for segment in segments:
        prompt = prompt_of[len(prompt_of)] = len(prompt_of)
        owner += [prompt] * segment.prompt
        position += range(segment.prompt)
        for length in segment.completions:
            prompt_of[number := len(prompt_of)] = prompt
            owner += [number] * length
            position += range(segment.prompt, segment.prompt + length)
    owners, places = torch.tensor(owner), torch.tensor(position)
    of_prompt = torch.tensor([prompt_of[number] for number in owner])
    mine = (owners[None] == owners[:, None]) | (owners[None] == of_prompt[:, None])
    back = places[:, None] - places[None]
    return mine & (back >= 0) & (back < (window or len(owner)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 2, 100])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (4, 1)])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_one_call_is_attention_under_a_dense_mask(
    size: int, heads: tuple[int, int], window: int | None, dtype: torch.dtype
) -> None:
    """Output and gradients, against fp32 of the same numbers; those of a prompt add up over its completions."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads[0], LENGTH, size), *[(1, heads[1], LENGTH, size)] * 2]
    numbers = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    factors = torch.randn(1, LENGTH, heads[0], size, generator=generator).cuda()
    narrow = [part.cuda().requires_grad_() for part in numbers]
    if not has_varlen(narrow[0], narrow[2]):
        pytest.skip(f"no kernel for heads of {size} on this card or in this PyTorch")
    assert attention_for(narrow[0], narrow[2]) is varlen_attention
    found = varlen_attention(narrow[0], narrow[1], narrow[2], SEGMENTS, None, window)
    wide = [part.cuda().float().requires_grad_() for part in numbers]
    expected = scaled_dot_product_attention(
        wide[0], wide[1], wide[2], attn_mask=mask_of(SEGMENTS, window).cuda(), enable_gqa=True
    ).transpose(1, 2)
    pairs = [(found, expected)]
    of_found, of_expected = (
        torch.autograd.grad((output.float() * factors).sum(), parts)
        for output, parts in ((found, narrow), (expected, wide))
    )
    pairs += zip(of_found, of_expected, strict=True)
    for one, other in pairs:
        assert (one.float() - other).norm() < 0.01 * other.norm() + 1e-6


def test_float32_goes_piece_by_piece() -> None:
    query = torch.empty(1, 4, 8, 64, device="cuda")
    assert attention_for(query, query) is joined_attention


def of_head(dtype: torch.dtype, bias: bool) -> Inputs:
    """As leaves: several tiles of rows and columns and several blocks a tile, none of them full at the end."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).div(4).to(dtype).cuda().requires_grad_()

    labels = torch.randint(20_011, (2_500,), generator=generator).cuda()
    return Inputs(leaf(2_500, 64), leaf(20_011, 64), leaf(20_011) if bias else None, labels)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("of_logps", "of_entropies"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_heads_kernels_are_eager_pytorch_and_the_full_logits(
    dtype: torch.dtype, of_logps: bool, of_entropies: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = of_head(dtype, bias)
    assert head._fused(given.hidden)
    found = linear_scores(*given)
    of_found = gradients(found, given, of_logps, of_entropies)
    monkeypatch.setattr(head, "_fused", lambda logits: False)
    eager = linear_scores(*given)
    of_eager = gradients(eager, given, of_logps, of_entropies)
    for name, one, other in zip(TokenScores._fields, found, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)
    for one, other in zip(of_found, of_eager, strict=True):
        assert one.dtype == dtype and (one.float() - other.float()).norm() < 0.01 * other.float().norm()
    if dtype == torch.float32:
        expected = plain(given)
        torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-3, atol=1e-3)
        for one, other in zip(of_found, gradients(expected, given, of_logps, of_entropies), strict=True):
            assert (one - other).norm() < 1e-3 * other.norm()


def test_the_heads_kernels_read_one_gradient_for_all_tokens() -> None:
    """What `sum` hands over is one value, seen as many."""
    given = of_head(torch.float32, bias=False)
    (found,) = torch.autograd.grad(linear_scores(*given).logps.sum(), given.hidden)
    (expected,) = torch.autograd.grad(plain(given).logps.sum(), given.hidden)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_what_goes_to_a_gpu_is_there_when_it_is_read() -> None:
    values = torch.arange(1_000_000)
    assert torch.equal(on_device(values, torch.device("cuda")).cpu(), values)
