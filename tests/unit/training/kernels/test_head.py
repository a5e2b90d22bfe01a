"""The chunked output head against the plain formulas on full logits."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from raylign.training.kernels import head
from raylign.training.kernels.head import TokenScores, linear_scores

TOKENS, HIDDEN, VOCABULARY = 10, 6, 17
DTYPES = [torch.float64, torch.float32]


class Inputs(NamedTuple):
    """What the head gets, as leaves that ask for gradients."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor


def inputs(dtype: torch.dtype = torch.float64, bias: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    hidden, weight = leaf(TOKENS, HIDDEN), leaf(VOCABULARY, HIDDEN)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return Inputs(hidden, weight, leaf(VOCABULARY) if bias else None, labels)


def plain(given: Inputs) -> TokenScores:
    """The definitions, in the dtype of the inputs."""
    logits = torch.nn.functional.linear(given.hidden, given.weight, given.bias)
    log_p = logits.log_softmax(-1)
    return TokenScores(
        logps=log_p.gather(-1, given.labels[:, None])[:, 0],
        entropies=-(log_p.exp() * log_p).sum(-1),
        correct=(logits.argmax(-1) == given.labels).to(logits.dtype),
        mean_logits=logits.mean(-1),
        log_collisions=(2 * log_p).logsumexp(-1),
    )


def gradients(scores: TokenScores, given: Inputs, of_logps: bool, of_entropies: bool) -> tuple[Tensor, ...]:
    """Of a sum with a different factor for each token."""
    factors = torch.arange(1.0, len(given.labels) + 1, device=given.labels.device) - 4.5
    total = scores.logps.new_zeros(())
    if of_logps:
        total = total + (scores.logps * factors).sum()
    if of_entropies:
        total = total + (scores.entropies * factors.flip(0)).sum()
    leaves = [leaf for leaf in (given.hidden, given.weight, given.bias) if leaf is not None]
    return torch.autograd.grad(total, leaves)


@pytest.fixture(params=[None, (1, 100), (100, 1), (3, 5), (4, 16)], ids=lambda shape: f"tiles of {shape}")
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are, token by token, entry by entry, uneven in both ways, one entry left over."""
    if request.param is not None:
        monkeypatch.setitem(head._TILES, "cpu", head.Tile(*request.param))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_those_of_the_full_logits(dtype: torch.dtype, bias: bool) -> None:
    given = inputs(dtype, bias)
    found, expected = linear_scores(*given), plain(given)
    for name, one, other in zip(TokenScores._fields, found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5, msg=name)
        assert one.requires_grad == (name in ("logps", "entropies")), name


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("of_logps", "of_entropies"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_full_logits(
    dtype: torch.dtype, bias: bool, of_logps: bool, of_entropies: bool
) -> None:
    given = inputs(dtype, bias)
    found = gradients(linear_scores(*given), given, of_logps, of_entropies)
    expected = gradients(plain(given), given, of_logps, of_entropies)
    assert [gradient.dtype for gradient in found] == [dtype] * len(found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_bf16_scores_are_those_of_its_own_logits_in_fp32() -> None:
    given = inputs(torch.bfloat16)
    logits = torch.nn.functional.linear(given.hidden, given.weight, given.bias).float()
    found = linear_scores(*given)
    expected = logits.log_softmax(-1).gather(-1, given.labels[:, None])[:, 0]
    torch.testing.assert_close(found.logps, expected, rtol=1e-5, atol=1e-5)
    assert given.bias is not None
    leaves = (given.hidden, given.weight, given.bias)
    hidden, weight, bias = (leaf.detach().double().requires_grad_() for leaf in leaves)
    wide = Inputs(hidden, weight, bias, given.labels)
    pairs = zip(gradients(found, given, True, True), gradients(plain(wide), wide, True, True), strict=True)
    for narrow, exact in pairs:
        assert narrow.dtype == torch.bfloat16
        assert (narrow.double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_asks_for_a_gradient_gets_one(wanted: tuple[bool, bool]) -> None:
    given = inputs()
    for leaf, wants in zip((given.hidden, given.weight), wanted, strict=True):
        leaf.requires_grad_(wants)
    assert given.bias is not None
    given.bias.requires_grad_(False)
    scores = linear_scores(*given)
    assert scores.logps.requires_grad == any(wanted)
    if any(wanted):
        (leaf,) = [leaf for leaf in (given.hidden, given.weight) if leaf.requires_grad]
        torch.autograd.backward(scores.logps.sum())
        assert [part.grad is not None for part in (given.hidden, given.weight, given.bias)] == [*wanted, False]
        (expected,) = torch.autograd.grad(plain(given).logps.sum(), leaf)
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_ignores_the_text_by_hand() -> None:
    """The bias alone speaks: token k of 0..3 has the logit ln (k + 1), so p = (1, 2, 3, 4) / 10."""
    labels = torch.tensor([0, 3])
    found = linear_scores(torch.ones(2, 5), torch.zeros(4, 5), torch.arange(1.0, 5.0).log(), labels)
    assert found.logps.tolist() == pytest.approx([math.log(0.1), math.log(0.4)])
    entropy = -sum(k / 10 * math.log(k / 10) for k in range(1, 5))
    assert found.entropies.tolist() == pytest.approx([entropy] * 2)
    assert found.correct.tolist() == [0, 1]
    assert found.mean_logits.tolist() == pytest.approx([math.log(24) / 4] * 2)
    assert found.log_collisions.tolist() == pytest.approx([math.log(0.3)] * 2)  # (1 + 4 + 9 + 16) / 100


def test_huge_logits_stay_finite() -> None:
    """A logit of 1e4 against 0: log p is 0 or -1e4 and the gradient of the improbable label is 1 - 0 at its own."""
    weight = torch.tensor([[1e4], [0.0]], requires_grad=True)
    scores = linear_scores(torch.ones(2, 1), weight, None, torch.tensor([0, 1]))
    assert scores.logps.tolist() == [0.0, -1e4]
    assert scores.entropies.tolist() == [0.0, 0.0] and scores.log_collisions.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(scores.logps[1] + scores.entropies.sum(), weight)
    assert gradient.tolist() == [[-1.0], [1.0]]


def test_no_tokens_give_no_scores_and_gradients_of_zero() -> None:
    given = inputs()
    none = given.hidden[:0]
    scores = linear_scores(none, given.weight, given.bias, given.labels[:0])
    assert {part.shape for part in scores} == {(0,)}
    (gradient,) = torch.autograd.grad(scores.logps.sum() + scores.entropies.sum(), given.weight)
    assert torch.equal(gradient, torch.zeros_like(given.weight))
