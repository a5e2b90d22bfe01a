"""Win rates at equal lengths: AlpacaEval 2's logistic adjustment (Dubois et al. 2024, arXiv 2404.04475, equation 2).

Judges like long answers, and so do many scorers. A logistic model of the preference takes the effect of length apart
from that of the policy; the controlled rate is what it predicts where answers are as long as the opponent's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylign.evaluation.intervals import Values, quantile

Indices = np.ndarray[Any, np.dtype[np.int64]]
_WEAK = 0.01
"""Precision of the normal prior of a coefficient of length or difficulty: none without it where length decides all."""
_STANDARD = 1.0
"""That of a prompt's difficulty, which few opponents tell."""


@dataclass(frozen=True, slots=True)
class Controlled:
    """A win rate at equal lengths with its bounds, all in 0..1; `length` is the coefficient of tanh(difference)."""

    rate: float
    low: float
    high: float
    length: float


def length_controlled(
    outcomes: Sequence[Sequence[float]],
    longer: Sequence[Sequence[float]],
    confidence: float,
    difficulty: Sequence[float] | None = None,
) -> Controlled:
    """Win rate at length difference 0: the mean over prompts x of sigmoid(theta + psi * gamma_x).

    `outcomes[x]` has prompt x's pairs, in 0..1, and `longer[x]` how much longer each answer is than its opponent's.
    Preferences are modelled as q = sigmoid(theta + phi * tanh(longer / std(longer)) + psi * gamma_x); gamma, the
    `difficulty` of each prompt, is left out without it (`difficulties` takes it from other opponents). Each prompt
    weighs the same. A win and a loss at equal lengths are added, so that nothing runs away where one side wins all;
    AlpacaEval's own prior (annotations of verbose and concise answers of its baseline) is of that baseline alone.

    The interval is Student's t on the logit of the rate, by the delta method, with the variance that comes out of the
    prompts (the sandwich of generalised estimating equations, Liang and Zeger 1986), as outcomes may be any share.
    """
    rows = [(x, y, z) for x, own in enumerate(outcomes) for y, z in zip(own, longer[x], strict=True)]
    owner = np.array([x for x, _, _ in rows])
    gamma = np.zeros(len(outcomes)) if difficulty is None else _centred(np.asarray(difficulty, dtype=np.float64))
    tanh = standardised([z for _, _, z in rows])
    columns = [np.ones(len(rows)), tanh, *([gamma[owner]] if gamma.any() else [])]
    added = np.zeros((2, len(columns)))
    added[:, 0] = 1.0
    features = np.concatenate([np.stack(columns, axis=1), added])
    targets = np.array([*(y for _, y, _ in rows), 0.0, 1.0])
    weights = np.concatenate([1.0 / np.bincount(owner)[owner], np.ones(2)])
    prior = np.array([0.0, *[_WEAK] * (len(columns) - 1)])
    fitted = fit_logistic(features, targets, weights, prior)
    clusters = np.concatenate([owner, [len(outcomes), len(outcomes) + 1]])
    variance = _sandwich(features, targets, weights, prior, fitted, clusters)
    at_zero = np.stack([np.ones(len(outcomes)), np.zeros(len(outcomes)), gamma], axis=1)[:, : len(columns)]
    predicted = _sigmoid(at_zero @ fitted)
    rate = float(predicted.mean())
    slope = ((predicted * (1 - predicted))[:, None] * at_zero).mean(axis=0) / (rate * (1 - rate))
    half = quantile(confidence, len(outcomes) + 2 - 1) * float(np.sqrt(slope @ variance @ slope))
    logit = np.log(rate / (1 - rate))
    low, high = _sigmoid(np.array([logit - half, logit + half]))
    return Controlled(rate, float(low), float(high), float(fitted[1]))


def standardised(longer: Sequence[float]) -> Values:
    """tanh of the length differences over their standard deviation; zeros where all are alike and nothing is told."""
    values = np.asarray(longer, dtype=np.float64)
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return np.tanh(values / spread) if spread > 0 else np.zeros(len(values))


def difficulties(
    outcomes: Sequence[Sequence[float]], longer: Sequence[Sequence[float]], opponents: Sequence[int], prompts: int
) -> Values:
    """[prompts] gamma_x: how much better than elsewhere the answers do on prompt x, in logits, against all opponents.

    Row i is a comparison with opponent `opponents[i]`: `outcomes[i][x]`, NaN where there is none, and `longer[i][x]`.
    The joint regression of the paper, logit q = theta_o + phi_o * tanh(...) + gamma_x with psi = 1, gamma having a
    standard normal prior. Give it the opponents other than the one whose rate it shall help with: its own outcomes
    would predict themselves.
    """
    places = sorted(set(opponents))
    blocks, targets = [], []
    for row, opponent in enumerate(opponents):
        there = np.flatnonzero(~np.isnan(outcomes[row]))
        block = np.zeros((len(there), 2 * len(places) + prompts))
        at = 2 * places.index(opponent)
        block[:, at] = 1.0
        block[:, at + 1] = standardised([longer[row][x] for x in there])
        block[np.arange(len(there)), 2 * len(places) + there] = 1.0
        blocks.append(block)
        targets.append(np.asarray(outcomes[row])[there])
    prior = np.array([_WEAK] * 2 * len(places) + [_STANDARD] * prompts)
    features, target = np.concatenate(blocks), np.concatenate(targets)
    return fit_logistic(features, target, np.ones(len(target)), prior)[2 * len(places) :]


def fit_logistic(features: Values, targets: Values, weights: Values, prior: Values) -> Values:
    """Coefficients [k] of the logistic regression of `targets` [n], in 0..1, on `features` [n, k].

    Minimises sum_i w_i (log(1 + exp(eta_i)) - y_i eta_i) + sum_j prior_j beta_j^2 / 2.
    """
    from scipy.optimize import minimize  # noqa: PLC0415 - takes seconds to load, for commands that evaluate nothing too

    def loss(beta: Values) -> float:
        eta = features @ beta
        return float(weights @ (np.logaddexp(0.0, eta) - targets * eta) + (prior * beta) @ beta / 2)

    def gradient(beta: Values) -> Values:
        return features.T @ (weights * (_sigmoid(features @ beta) - targets)) + prior * beta

    def curvature(beta: Values) -> Values:
        return _curvature(features, weights, prior, beta)

    start = np.zeros(features.shape[1])
    found = minimize(loss, start, jac=gradient, hess=curvature, method="trust-exact", options={"gtol": 1e-8})
    return np.asarray(found.x)


def _curvature(features: Values, weights: Values, prior: Values, beta: Values) -> Values:
    mean = _sigmoid(features @ beta)
    return features.T @ ((weights * mean * (1 - mean))[:, None] * features) + np.diag(prior)


def _sandwich(
    features: Values, targets: Values, weights: Values, prior: Values, beta: Values, clusters: Indices
) -> Values:
    """Covariance [k, k] of the coefficients, rows of one cluster being one piece of evidence."""
    bread = np.linalg.pinv(_curvature(features, weights, prior, beta))
    residuals = (weights * (targets - _sigmoid(features @ beta)))[:, None] * features
    scores = np.zeros((int(clusters.max()) + 1, features.shape[1]))
    np.add.at(scores, clusters, residuals)
    count, used = len(scores), features.shape[1]
    return np.asarray(bread @ (scores.T @ scores) @ bread * (count / max(1, count - used)))


def _centred(values: Values) -> Values:
    return np.asarray(values - values.mean())


def _sigmoid(values: Values) -> Values:
    return np.asarray(np.exp(-np.logaddexp(0.0, -values)))
