"""Strengths from pairwise judgements."""

from collections.abc import Sequence
from dataclasses import dataclass

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

    def interval(self, player: int, confidence: float = 0.95) -> tuple[float, float]:
        """Normal-theory bounds of a strength relative to the mean of all."""
        half = float(norm.ppf((1 + confidence) / 2) * np.sqrt(self.covariance[player, player]))
        return self.values[player] - half, self.values[player] + half

    def difference_interval(self, first: int, second: int, confidence: float = 0.95) -> tuple[float, float]:
        """Normal-theory bounds of w_first - w_second, which is what judgements tell of two players."""
        matrix = self.covariance
        variance = matrix[first, first] + matrix[second, second] - 2 * matrix[first, second]
        half = float(norm.ppf((1 + confidence) / 2) * np.sqrt(variance))
        middle = self.values[first] - self.values[second]
        return middle - half, middle + half


def bradley_terry_strengths(wins: Sequence[Sequence[float]], prior: float = 0.0) -> Strengths:
    """Maximum-likelihood strengths: P(i beats j) = sigmoid(w_i - w_j) (Bradley and Terry 1952).

    `wins[i][j]` counts how often i beat j; a tie is half a win for each. `prior` adds so many wins in both directions
    to every pair that met, which keeps strengths finite. Raises ValueError for a table that is not square, not finite
    or negative, and where the estimate is infinite or undefined: when players never lose to the others, or never met.
    """
    table = np.asarray(wins, dtype=np.float64)
    count = len(wins)
    if table.shape != (count, count) or count < 2 or not np.isfinite(table).all() or (table < 0).any():
        raise ValueError(f"wins must be a square table of at least 2 x 2 counts, not below 0; got shape {table.shape}")
    np.fill_diagonal(table, 0.0)
    table += prior * ((table + table.T) > 0)
    _require_finite_estimate(table)
    result = minimize(_loss, np.zeros(count), args=(table,), jac=_gradient, method="BFGS", options={"gtol": 1e-10})
    values = result.x - result.x.mean()
    covariance: Matrix = np.linalg.pinv(_information(values, table), hermitian=True).astype(np.float64)
    return Strengths(tuple(values.tolist()), covariance)


def _require_finite_estimate(table: Matrix) -> None:
    """The estimate is finite when every player can be reached from every other one over wins (Ford 1957)."""
    parts, labels = connected_components(table > 0, directed=True, connection="strong")
    if parts > 1:
        groups = [np.flatnonzero(labels == part).tolist() for part in range(parts)]
        raise ValueError(
            f"strengths are infinite or undefined: between the groups of players {groups} all wins go one way, or "
            "there are none; judge more pairs, or give a prior such as 0.5"
        )


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
