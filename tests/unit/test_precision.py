"""The statistics of the precision benchmark, against closed forms."""

import numpy as np
import pytest
import torch

from tests.benchmarks.harness import products
from tests.benchmarks.harness.precision import (
    LogpsResult,
    dpo_margins,
    interval,
    losses_of,
    right_of,
    share_of,
)


def test_margins_and_losses_are_those_of_dpo_by_hand() -> None:
    policy = LogpsResult(chosen=(-1.0, -4.0, -2.0), rejected=(-3.0, -2.0, -2.0))
    reference = LogpsResult(chosen=(-2.0, -2.0, -2.0), rejected=(-2.0, -2.0, -2.0))
    margins = dpo_margins(policy, reference, beta=0.5)
    assert margins.tolist() == [1.0, -1.0, 0.0]
    assert losses_of(margins) == pytest.approx([np.log1p(np.exp(-1)), np.log1p(np.exp(1)), np.log(2)])
    assert right_of(margins).tolist() == [1.0, 0.0, 0.5]


def test_an_interval_covers_the_mean_as_wide_as_a_normal_one() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, 400)
    low, high = interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert interval(np.full(5, 0.25)) == (0.25, 0.25)


def test_the_share_is_the_slope_of_least_squares_over_seeds_and_pairs() -> None:
    rng = np.random.default_rng(2)
    exact = rng.normal(size=(3, 200))
    share, low, high = share_of(0.4 * exact, exact)
    assert [share, low, high] == pytest.approx([0.4, 0.4, 0.4])
    noisy = 0.4 * exact + rng.normal(scale=0.5, size=exact.shape)
    share, low, high = share_of(noisy, exact)
    slope = np.polynomial.polynomial.polyfit(exact.ravel(), noisy.ravel(), [1])[1]
    assert share == pytest.approx(slope) and low < share < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 600**0.5, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_through_fp32_are_those_of_fp64_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(3, 40, 70).to(dtype), torch.randn(3, 50, 70).to(dtype).transpose(1, 2)
    exact = left.double() @ right.double()
    batched, single = products.bmm(left, right), products.mm(left[0], right[0])
    assert batched.dtype == single.dtype == dtype
    for found, wanted in ((batched, exact), (single, exact[0])):
        torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps / 2, atol=1e-5)
