"""How healthy a policy version is, whatever its scorer says: how far it has moved, and whether it degenerates."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from raylign.config.guard import beta_of, is_displaceable
from raylign.config.losses import LossBlock
from raylign.records import Candidate

CHOSEN_CHANGE, REJECTED_CHANGE = "logps/chosen_change", "logps/rejected_change"
DISPLACED = "logps/displacement"


def kl_per_token(candidates: Sequence[Candidate], logps: Sequence[float]) -> float | None:
    """sum_y (log pi(y) - log p(y)) / sum_y |y|: k1 of http://joschu.net/blog/kl-approx.html over tokens, in nats.

    `logps` are summed log-probabilities under p, parallel to the candidates; None without them or without a token.
    Unbiased for completions drawn from pi, up to the ratio of two means.
    """
    tokens = sum(len(candidate.token_ids) for candidate in candidates)
    return sum(_log_ratios(candidates, logps)) / tokens if logps and tokens else None


def kl_k3(candidates: Sequence[Candidate], logps: Sequence[float]) -> float | None:
    """Mean over sequences of r - 1 - log r with r = p(y) / pi(y): k3 of the same page, in nats, never below 0.

    Unbiased as k1 is; its variance is lower where the two are close, and higher where they are nats apart: far above
    k1, some completions are much likelier under p. None without `logps`, and where a ratio is past what a float holds.
    """
    return _mean_k3(_log_ratios(candidates, logps))


def _mean_k3(ratios: Sequence[float]) -> float | None:
    """Of log pi - log p."""
    if not ratios or min(ratios) < -math.log(np.finfo(np.float64).max):
        return None
    return float(np.mean([math.expm1(-ratio) + ratio for ratio in ratios]))


def kl_k3_per_token(candidates: Sequence[Candidate], logprobs: Sequence[Sequence[float]]) -> float | None:
    """Mean over tokens of r - 1 - log r with r = p(y_t) / pi(y_t): k3 of each token's distribution, never below 0.

    `logprobs` are those of each candidate's tokens under p, parallel to the candidates. Unbiased as `kl_per_token` is;
    where single tokens are close its variance is far lower, however far whole completions are apart. None as there.
    """
    ratios = [
        own - other
        for candidate, others in zip(candidates, logprobs, strict=True)
        for own, other in zip(candidate.logprobs, others, strict=True)
    ]
    return _mean_k3(ratios)


def _log_ratios(candidates: Sequence[Candidate], logps: Sequence[float]) -> list[float]:
    """log pi(y) - log p(y) of each; empty without `logps`."""
    return [sum(c.logprobs) - logp for c, logp in zip(candidates, logps, strict=True)] if logps else []


def sampled_entropy(candidates: Sequence[Candidate]) -> float | None:
    """-mean log pi(y_t) over all sampled tokens, in nats a token; None without a token.

    Generators give log-probabilities of sampled tokens alone, so this is the estimate of the entropy by them, unbiased
    at `evaluation.temperature` 1. The trainer's `entropy` in each step is the exact one, on the tokens of preferences.
    """
    logprobs = [logprob for candidate in candidates for logprob in candidate.logprobs]
    return -math.fsum(logprobs) / len(logprobs) if logprobs else None


def n_grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All of length n, in order."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def distinct_n(candidates: Sequence[Candidate], n: int) -> float:
    """Distinct n-grams of tokens over all of them, over all completions (Li et al. 2016); 0 without any."""
    found = [gram for candidate in candidates for gram in n_grams(candidate.token_ids, n)]
    return len(set(found)) / len(found) if found else 0.0


def seq_rep_n(candidates: Sequence[Candidate], n: int) -> float:
    """1 - distinct n-grams / n-grams within a completion (seq-rep-n of Welleck et al. 2019, arXiv 1908.04319).

    The mean over the completions that have an n-gram; 0 where none has.
    """
    of_each = [found for candidate in candidates if (found := n_grams(candidate.token_ids, n))]
    return float(np.mean([1 - len(set(found)) / len(found) for found in of_each])) if of_each else 0.0


def round_health(steps: Sequence[Mapping[str, float]], loss: LossBlock) -> dict[str, float]:
    """What training did to chosen and rejected answers as a whole, in nats a pair, the mean over the round's steps.

    Their log-probabilities less those under the reference of the round: TRL's `rewards/chosen` and `rewards/rejected`
    over beta. `logps/displacement` is how far both have fallen together, 0 where one has not: likelihood displacement,
    after which something else got likelier (Razin et al. 2024, arXiv 2410.08847). `beta` is that of the round. Empty
    where a loss logs no such rewards, or no pair had two answers.
    """
    beta = beta_of(loss)
    if beta is None or not is_displaceable(loss):
        return {}
    chosen, rejected = (_finite_mean(steps, name) for name in ("rewards/chosen", "rewards/rejected"))
    if chosen is None or rejected is None:
        return {"beta": beta}
    displaced = max(0.0, min(-chosen, -rejected)) / beta
    return {"beta": beta, CHOSEN_CHANGE: chosen / beta, REJECTED_CHANGE: rejected / beta, DISPLACED: displaced}


def _finite_mean(steps: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [step[name] for step in steps if math.isfinite(step.get(name, math.nan))]
    return math.fsum(values) / len(values) if values else None
