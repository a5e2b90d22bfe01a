"""Strengths from pairwise judgements."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit
from scipy.stats import norm

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Strengths:
    """Bradley-Terry strengths w of n players, on the scale of logits, with mean 0. Made by `bradley_terry_strengths`.

    `covariance` [n, n] is that of the estimates: the pseudo-inverse of the observed Fisher information.
    """

    values: tuple[float, ...]
    covariance: Matrix

    def probability(self, first: int, second: int) -> float:
        """P(first beats second) = sigmoid(w_first - w_second)."""
        return float(expit(self.values[first] - self.values[second]))

    @property
    def standard_errors(self) -> tuple[float, ...]:
        """Of the strengths relative to the mean of all."""
        return tuple(np.sqrt(np.diag(self.covariance)).tolist())

    def interval(self, player: int, confidence: float = 0.95) -> tuple[float, float]:
        """Normal-theory bounds of a strength relative to the mean of all."""
        half = _half_width(float(self.covariance[player, player]), confidence)
        return self.values[player] - half, self.values[player] + half

    def difference_interval(self, first: int, second: int, confidence: float = 0.95) -> tuple[float, float]:
        """Normal-theory bounds of w_first - w_second, which is what judgements tell of two players."""
        matrix = self.covariance
        variance = matrix[first, first] + matrix[second, second] - 2 * matrix[first, second]
        half = _half_width(float(variance), confidence)
        middle = self.values[first] - self.values[second]
        return middle - half, middle + half


def bradley_terry_strengths(wins: Sequence[Sequence[float]], prior: float = 0.0) -> Strengths:
    """Maximum-likelihood strengths: P(i beats j) = sigmoid(w_i - w_j) (Bradley and Terry 1952).

    `wins[i][j]` counts how often i beat j; a tie is half a win for each. `prior` adds this many wins in both directions
    to every pair that met, which keeps strengths finite. Raises ValueError for a table that is not square, not finite,
    negative or has a player meet itself, for a negative prior, and where the estimate is infinite or undefined: when
    some players never lose to the others, or never met them.
    """
    table = _checked(wins)
    if not 0 <= prior < np.inf:
        raise ValueError(f"prior={prior} must be finite and not below 0; take 0, or 0.5 for strengths that stay finite")
    table += prior * ((table + table.T) > 0)
    _require_finite_estimate(table)
    start = np.zeros(len(table))
    result = minimize(_loss, start, args=(table,), jac=_gradient, method="BFGS", options={"gtol": 1e-10})
    if (off := np.abs(_gradient(result.x, table)).max() / table.sum()) > 1e-6:
        raise ValueError(f"no maximum of the likelihood was found: wins are off by a share of {off:.1e}; give a prior")
    values = result.x - result.x.mean()
    covariance: Matrix = np.linalg.pinv(_information(values, table), hermitian=True).astype(np.float64)
    return Strengths(tuple(values.tolist()), covariance)


def _half_width(variance: float, confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, as 0.95 does")
    return float(norm.ppf((1 + confidence) / 2)) * math.sqrt(variance)


def _checked(wins: Sequence[Sequence[float]]) -> Matrix:
    """A copy of `wins`."""
    count = len(wins)
    lengths = sorted({len(row) for row in wins})
    if count < 2 or lengths != [count]:
        raise ValueError(f"wins must be a square table of at least 2 x 2; got {count} rows of {lengths} counts")
    table: Matrix = np.array(wins, dtype=np.float64)
    wrong = ~np.isfinite(table) | (table < 0) | (np.eye(count, dtype=bool) & (table != 0))
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"wins[{row}][{column}]={table[row, column]:g}: counts must be finite and not below 0, and 0 for a player "
            "against itself"
        )
    return table


def _require_finite_estimate(table: Matrix) -> None:
    """The estimate is finite when every player can be reached from every other one over wins (Ford 1957)."""
    if len(apart := _parts(table, "weak")) > 1:
        raise ValueError(
            f"strengths are undefined: the groups of players {apart} never met each other; judge pairs across them"
        )
    if len(one_way := _parts(table, "strong")) > 1:
        raise ValueError(
            f"strengths are infinite: between the groups of players {one_way} all wins go one way; judge more pairs, "
            "or give a prior such as 0.5"
        )


def _parts(table: Matrix, connection: Literal["weak", "strong"]) -> list[list[int]]:
    count, labels = connected_components(table > 0, directed=True, connection=connection)
    return [np.flatnonzero(labels == part).tolist() for part in range(count)]


def _gaps(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Matrix:
    gaps: Matrix = values[:, None] - values[None, :]
    return gaps


def _loss(values: np.ndarray[tuple[int], np.dtype[np.float64]], table: Matrix) -> float:
    return -float((table * log_expit(_gaps(values))).sum())


def _gradient(
    values: np.ndarray[tuple[int], np.dtype[np.float64]], table: Matrix
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    surprise = table * expit(-_gaps(values))
    slope: np.ndarray[tuple[int], np.dtype[np.float64]] = surprise.sum(0) - surprise.sum(1)
    return slope


def _information(values: np.ndarray[tuple[int], np.dtype[np.float64]], table: Matrix) -> Matrix:
    """Negative second derivatives of the log-likelihood: the Laplacian with weights n_ij p_ij (1 - p_ij)."""
    chances = expit(_gaps(values))
    weights = (table + table.T) * chances * (1 - chances)
    laplacian: Matrix = np.diag(weights.sum(1)) - weights
    return laplacian
