"""fp32 masters: equal to the checkpoint at the start, gradients summed in fp32, AdamW as by hand."""

import math
from collections.abc import Callable
from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from raylign.config.blocks import TrainerBlock
from raylign.training.masters import Kind, MasterWeights, adamw, global_norm

RATE = 1e-2
MICRO_BATCHES = 64
KINDS: tuple[Kind, ...] = ("weights", "exp_avg", "exp_avg_sq")


class _Tied(nn.Module):
    """A tiny language model whose head is its embedding, with a frozen and an idle part."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, 16, dtype=dtype)
        self.layer = nn.Linear(16, 16, dtype=dtype)
        self.frozen = nn.Linear(16, 16, dtype=dtype).requires_grad_(False)
        self.idle = nn.Linear(16, 16, dtype=dtype)
        self.head = nn.Linear(16, 32, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.frozen(torch.tanh(self.layer(self.embedding(ids)))))
        return nn.functional.cross_entropy(logits.float(), ids.roll(1))


def _masters(module: nn.Module, **options: float) -> MasterWeights:
    block = TrainerBlock.model_validate({"learning_rate": RATE, "max_grad_norm": 0.0, **options})
    return MasterWeights({name: p for name, p in module.named_parameters() if p.requires_grad}, block)


def _batches(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 32, (12,), generator=draw) for _ in range(count)]


def _weights(masters: MasterWeights) -> dict[str, Tensor]:
    return {name: masters.read(name, "weights").clone() for name in masters.names()}


def _gradients_of(module: nn.Module, batch: Tensor) -> list[Tensor]:
    """By autograd itself, in fp64."""
    trained = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(module(batch), trained, allow_unused=True)
    return [torch.zeros_like(p).double() if g is None else g.double() for p, g in zip(trained, found, strict=True)]


def test_the_optimizer_by_hand() -> None:
    """In one fused pass."""
    weight = torch.zeros(2)
    block = TrainerBlock(learning_rate=3e-4, weight_decay=0.01, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    (group,) = adamw([weight], block).param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(weight)]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.8, 0.95), 1e-6, 0.01)
    assert group["fused"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_masters_are_the_checkpoint_exactly_before_the_first_step(dtype: torch.dtype) -> None:
    module = _Tied(dtype)
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    masters = _masters(module, weight_decay=10.0)
    assert (
        before.keys()
        == set(masters.names())
        == {f"layer.{n}" for n in ("weight", "bias")} | {f"idle.{n}" for n in ("weight", "bias")} | {"embedding.weight"}
    )
    assert not masters.has_moments() and masters.numel() == sum(p.numel() for p in before.values())
    assert all(torch.equal(weight, before[name].float()) for name, weight in _weights(masters).items())


def test_gradients_of_many_micro_batches_add_up_in_fp32() -> None:
    """In bf16 alone, as `.grad` adds them, the same sum is off by about 1 %."""
    module, peer = _Tied(torch.bfloat16), _Tied(torch.bfloat16)
    masters = _masters(module)
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in module.parameters() if p.requires_grad]
    for batch in _batches(MICRO_BATCHES):
        for total, gradient in zip(exact, _gradients_of(peer, batch), strict=True):
            total += gradient
        module(batch).backward()
        peer(batch).backward()
        assert all(p.grad is None for p in module.parameters()), "gradients in 16 bits are freed at once"
    norm = global_norm(exact)
    rounded = [torch.zeros(1) if p.grad is None else p.grad for p in peer.parameters() if p.requires_grad]
    assert global_norm([g.double() - e for g, e in zip(masters.gradients(), exact, strict=True)]) < 1e-6 * norm
    assert global_norm([g.double() - e for g, e in zip(rounded, exact, strict=True)]) > 3e-3 * norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 5.0}, {"max_grad_norm": 0.05, "weight_decay": 0.1}])
def test_steps_are_adamw_by_hand(dtype: torch.dtype, options: dict[str, float]) -> None:
    """Loshchilov and Hutter 2019 in fp64, from the first step on; what had no gradient has one of 0."""
    module, peer = _Tied(dtype), _Tied(dtype)
    masters = _masters(module, **options)
    trained = [p for p in peer.parameters() if p.requires_grad]
    weights = [p.detach().double() for p in trained]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    decay, limit = options.get("weight_decay", 0.0), options.get("max_grad_norm", math.inf)
    for step, batch in enumerate(_batches(3), 1):
        gradients = _gradients_of(peer, batch)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for w, g, m, v in zip(weights, gradients, first, second, strict=True):
            g *= min(1.0, limit / norm)
            m.lerp_(g, 0.1)
            v.lerp_(g * g, 0.001)
            w -= RATE * (decay * w + m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
        module(batch).backward()
        assert masters.step(RATE) == pytest.approx(norm, rel=1e-6)
        for name, parameter, weight, own in zip(masters.names(), trained, weights, _trained(module), strict=True):
            # Adam divides a rounding error in a tiny gradient by that gradient.
            torch.testing.assert_close(masters.read(name, "weights").double(), weight, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                own.float(), masters.read(name, "weights"), rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0
            )
            parameter.data.copy_(own)


def _trained(module: nn.Module) -> list[Tensor]:
    return [p.detach() for p in module.parameters() if p.requires_grad]


def test_small_updates_that_bf16_would_round_away_add_up() -> None:
    module = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    module.weight.data.fill_(1.0)
    masters = _masters(module)
    for _ in range(100):
        module(torch.ones(1, dtype=torch.bfloat16)).sum().backward()
        masters.step(1e-4)
    assert masters.read("weight", "weights").item() == pytest.approx(0.99, abs=1e-5)
    assert module.weight.item() == pytest.approx(0.99, abs=2**-8)


def test_steps_far_below_those_of_bf16_move_the_weights_on_average() -> None:
    """Ten of 5e-6: to the nearest of bf16, whose values around 0.15 are 0.001 apart, no weight would ever move."""
    module = nn.Linear(100_000, 1, bias=False, dtype=torch.bfloat16)
    module.weight.data.uniform_(-0.2, 0.2)
    before = module.weight.detach().double()
    masters = _masters(module)
    for step in range(1, 11):
        module(torch.ones(100_000, dtype=torch.bfloat16)).sum().backward()
        masters.step(5e-6)
        moved = (before - module.weight.detach().double()).mean().item()
        assert moved == pytest.approx(step * 5e-6, abs=4 * (0.001 * step * 5e-6 / 100_000) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_gone(dtype: torch.dtype, bad: float) -> None:
    module = _Tied(dtype)
    masters = _masters(module, weight_decay=1.0)
    one, two = _batches(2)
    module(one).backward()
    masters.step(RATE)
    before = [t.clone() for t in chain(_trained(module), _all(masters))]
    (module(two) * bad).backward()
    assert masters.step(RATE) is None
    assert all(torch.equal(*pair) for pair in zip(before, chain(_trained(module), _all(masters)), strict=True))
    module(two).backward()
    norm = masters.step(RATE)
    assert norm is not None and math.isfinite(norm)


def _all(masters: MasterWeights) -> list[Tensor]:
    return [masters.read(name, kind) for name in masters.names() for kind in KINDS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_read_is_all_that_another_needs(dtype: torch.dtype) -> None:
    module, other = _Tied(dtype), _Tied(dtype)
    masters, again = _masters(module), _masters(other)
    one, two = _batches(2)
    module(one).backward()
    masters.step(RATE)
    again.make_moments(1)
    for name in masters.names():
        for kind in KINDS:
            again.write(name, kind, masters.read(name, kind).clone())
    again.round()
    for each, own in ((module, masters), (other, again)):
        each(two).backward()
        own.step(RATE)
    assert all(torch.equal(*pair) for pair in zip(_all(masters), _all(again), strict=True))
    assert all(torch.equal(*pair) for pair in zip(_trained(module), _trained(other), strict=True))


@pytest.mark.parametrize("shape", [(30_000, 600), (64,), ()])
def test_the_norm_of_large_tensors_is_exact(shape: tuple[int, ...]) -> None:
    """PyTorch's own fp32 norm on CPUs is 1e-3 too small for the first."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert global_norm([gradient]) == pytest.approx(float(gradient.double().norm()), rel=1e-6)
    assert global_norm([gradient, 2 * gradient]) == pytest.approx(math.sqrt(5) * global_norm([gradient]))
    assert global_norm([]) == 0.0


@pytest.mark.parametrize("make", [torch.zeros, torch.ones])
def test_a_gradient_of_0_is_a_step(make: Callable[..., Tensor]) -> None:
    """Nothing to clip and nothing to divide by; decay still counts."""
    module = nn.Linear(2, 2, bias=False)
    module.weight.data.copy_(make(2, 2))
    masters = _masters(module, weight_decay=0.1, max_grad_norm=1.0)
    assert masters.step(RATE) == 0.0
    assert torch.allclose(module.weight, make(2, 2) * (1 - 0.1 * RATE))
