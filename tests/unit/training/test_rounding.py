"""Stochastic rounding into bf16: right on average, and right at once where bf16 has the value."""

import torch
from torch import Tensor

from raylign.training.masters import StochasticRounding

CPU = torch.device("cpu")


def rounded(source: Tensor, step: int, start: int = 0) -> Tensor:
    target = torch.empty_like(source, dtype=torch.bfloat16)
    StochasticRounding(step, CPU).round(source, target, start)
    return target.float()


def test_every_value_goes_to_one_of_its_neighbours_in_bf16() -> None:
    torch.manual_seed(0)
    source = torch.randn(300_000) * torch.logspace(-30, 30, 300_000)
    found = rounded(source, 1)
    nearest = source.bfloat16()
    away = torch.where(nearest.float() < source, torch.inf, -torch.inf).bfloat16()
    other = torch.nextafter(nearest, away)
    assert bool(((found == nearest.float()) | (found == other.float())).all())
    share = float((found == nearest.float()).float().mean())
    assert 0.7 < share < 0.8, "the nearest is taken with probability 3/4 on average"


def test_the_mean_over_steps_is_the_value() -> None:
    torch.manual_seed(0)
    source = torch.randn(4096) * 0.1
    spacing = (torch.nextafter(source.abs().bfloat16(), torch.tensor(torch.inf)) - source.abs().bfloat16()).float()
    steps = 400
    mean = torch.stack([rounded(source, step) for step in range(steps)]).mean(0)
    # A fraction p of the way up has a standard deviation of at most half the spacing.
    deviations = (mean - source) / (0.5 * spacing / steps**0.5)
    assert float(deviations.abs().max()) < 5
    assert abs(float(deviations.mean())) < 5 / len(source) ** 0.5


def test_what_bf16_holds_stays_as_it_is() -> None:
    source = torch.cat([torch.randn(1000).bfloat16().float(), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40])])
    source[-1] = torch.tensor(1e-40).bfloat16().float()
    for step in range(20):
        assert torch.equal(rounded(source, step), source)
    assert bool(rounded(torch.tensor([torch.nan]), 1).isnan().all())


def test_a_step_has_its_own_noise_and_always_the_same() -> None:
    source = torch.full((100_000,), 1.002)
    assert torch.equal(rounded(source, 3), rounded(source, 3))
    assert not torch.equal(rounded(source, 3), rounded(source, 4))


def test_parts_far_apart_are_rounded_independently() -> None:
    source = torch.full((1 << 20,), 1.002)
    ups = [(part > 1.002).double() for part in torch.split(rounded(source, 3), 1 << 18)]
    ups.append((rounded(source, 3, start=5 << 18)[: 1 << 18] > 1.002).double())
    together = torch.corrcoef(torch.stack(ups)) - torch.eye(len(ups))
    assert float(together.abs().max()) < 5 / (1 << 9), "the standard deviation of a correlation of 2^18 values is 2^-9"
