"""Agreement beside scikit-learn, published examples, the delta method by differences, and simulated raters."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from raylign.evaluation.agreement import cohen_kappa, krippendorff_alpha, share_interval

LABELS = ("first", "second", "tie")
TABLE = np.array([[30, 6, 2], [4, 25, 3], [5, 1, 4]])
"""Answers of two who differ in their margins."""


def raters(table: "np.ndarray[tuple[int, int], np.dtype[np.int64]]") -> tuple[list[str], list[str]]:
    cells = [(row, column) for row in range(3) for column in range(3) for _ in range(table[row, column])]
    return [LABELS[row] for row, _ in cells], [LABELS[column] for _, column in cells]


def kappa_of(shares: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> float:
    chance = float(shares.sum(axis=1) @ shares.sum(axis=0))
    return (float(np.trace(shares)) - chance) / (1 - chance)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_that_of_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    first = [LABELS[i] for i in generator.integers(3, size=40)]
    second = [
        LABELS[i] if generator.random() < 0.4 else own
        for i, own in zip(generator.integers(3, size=40), first, strict=True)
    ]
    found = cohen_kappa(first, second)
    assert found is not None
    assert found.value == pytest.approx(cohen_kappa_score(first, second))
    assert found.count == 40


def test_the_interval_is_the_delta_method() -> None:
    """The gradient of kappa by differences, and the covariance of a multinomial: no formula of 1969 in it."""
    count, shares, step = int(TABLE.sum()), TABLE / TABLE.sum(), 1e-6
    gradient = np.zeros(9)
    for cell in range(9):
        moved = np.zeros(9)
        moved[cell] = step
        up, down = shares + moved.reshape(3, 3), shares - moved.reshape(3, 3)
        gradient[cell] = (_free(up) - _free(down)) / (2 * step)
    flat = shares.ravel()
    variance = float(gradient @ (np.diag(flat) - np.outer(flat, flat)) @ gradient) / count
    found = cohen_kappa(*raters(TABLE))
    assert found is not None
    assert found.high - found.value == pytest.approx(1.959964 * variance**0.5, rel=1e-5)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def _free(cells: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> float:
    """Kappa of cells that need not sum to one, as a function of each of them."""
    return kappa_of(cells / cells.sum())


def test_the_interval_covers_the_true_kappa() -> None:
    """1,000 simulated pairs of raters at n = 100: 93 to 97 % of the intervals hold the kappa they are drawn from."""
    generator, shares = np.random.default_rng(0), TABLE / TABLE.sum()
    truth, held = kappa_of(shares), 0
    for _ in range(1000):
        drawn = generator.multinomial(100, shares.ravel()).reshape(3, 3)
        found = cohen_kappa(*raters(drawn))
        assert found is not None
        held += found.low <= truth <= found.high
    assert 930 <= held <= 970


def test_agreement_throughout_has_an_interval_too() -> None:
    found = cohen_kappa(["first", "second"] * 5, ["first", "second"] * 5)
    assert found is not None
    exact = binomtest(10, 10).proportion_ci(method="exact").low
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx((exact - 0.5) / 0.5)


def test_one_label_says_nothing() -> None:
    assert cohen_kappa(["tie"] * 5, ["tie"] * 5) is None
    assert cohen_kappa([], []) is None


def test_alpha_of_krippendorffs_example() -> None:
    """Computing Krippendorff's Alpha-Reliability (2011), section C: four observers, gaps, nominal alpha 0.743."""
    rows = ("123321412   ", "1233224125 3", " 3332342251 ", "12332441251 ")
    units = [[label for label in column if label != " "] for column in zip(*rows, strict=True)]
    found = krippendorff_alpha(units, seed=0)
    assert found is not None
    assert found.value == pytest.approx(0.743, abs=5e-4)
    assert found.low < found.value <= found.high <= 1


def test_alpha_needs_two_answers_to_one_item_that_could_differ() -> None:
    assert krippendorff_alpha([["first"], ["second"]], seed=0) is None
    assert krippendorff_alpha([["tie", "tie"], ["tie", "tie"]], seed=0) is None
    assert krippendorff_alpha([], seed=0) is None


def test_alpha_of_chance_is_about_nothing_and_of_agreement_one() -> None:
    generator = np.random.default_rng(1)
    by_chance = krippendorff_alpha([[LABELS[i] for i in generator.integers(3, size=3)] for _ in range(400)], seed=0)
    assert by_chance is not None and by_chance.low < 0 < by_chance.high and abs(by_chance.value) < 0.1
    alike = krippendorff_alpha([["first"] * 3, ["second"] * 3], seed=0)
    assert alike is not None and alike.value == 1


@pytest.mark.parametrize(("successes", "count"), [(0, 7), (3, 7), (7, 7), (61, 100)])
def test_shares_have_wilsons_interval(successes: int, count: int) -> None:
    found = share_interval(successes, count)
    wilson = binomtest(successes, count).proportion_ci(method="wilson")
    assert found is not None
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high))
    assert share_interval(0, 0) is None
