"""Held-out quality of one policy version: by what it samples, or by preferences that it has not seen."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np

from raylign.config.evaluation import GOLD
from raylign.config.offline import HeldOutBlock
from raylign.errors import ScorerError
from raylign.evaluation.health import distinct_n, kl_k3, kl_k3_per_token, kl_per_token, sampled_entropy, seq_rep_n
from raylign.evaluation.intervals import share_interval
from raylign.evaluation.win_rate import VersionRates
from raylign.pairing import group_by_prompt
from raylign.records import Candidate, Evaluation, HeldOutEvaluation, Prompt, Score

Values = np.ndarray[tuple[int], np.dtype[np.float64]]


def evaluate(
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    scores: Sequence[Score],
    reference_logps: Sequence[float],
    block: "Resampling",
    seed: int,
    initial_logprobs: Sequence[Sequence[float]] = (),
    gold: Sequence[Score] = (),
    win_rates: VersionRates | None = None,
) -> Evaluation:
    """Summarise held-out completions of one policy version.

    `candidates` is prompt-major; `scores`, `reference_logps` (summed log-probability, in nats, under the reference) and
    `initial_logprobs` (that of each token under the policy before round 1) run parallel to it, empty where there is
    nobody to ask, and so does `gold`, the scores of a gold scorer, empty without one. The score is the mean over
    prompts of the mean over their scored completions; unscored ones are counted and left out. Its interval is the
    percentile bootstrap over prompts, drawn with `seed`. `win_rates` are those of
    `raylign.evaluation.win_rate.against_versions`.

    The KL estimate, the mean of log pi(y|x) - log pi_ref(y|x), is unbiased only for completions drawn from the policy
    itself, at `temperature` 1. At lower temperatures it describes the likelier completions, at 0 the greedy one only.

    Raises ScorerError when every completion is unscored, ValueError when the sequences do not fit together.
    """
    initial_logps = [math.fsum(own) for own in initial_logprobs]
    means = _prompt_means(prompts, candidates, scores)
    low, high = mean_interval(means, block, seed)
    golds = _prompt_means(prompts, candidates, gold, GOLD) if gold else None
    gold_low, gold_high = (None, None) if golds is None else mean_interval(golds, block, seed)
    return Evaluation(
        score=float(means.mean()),
        score_low=low,
        score_high=high,
        kl=_kl(candidates, reference_logps),
        length=float(np.mean([len(candidate.token_ids) for candidate in candidates])),
        distinct_2=distinct_n(candidates, 2),
        eos_rate=float(np.mean([candidate.finish_reason == "stop" for candidate in candidates])),
        completions=len(candidates),
        unscored=sum(score.value is None for score in scores),
        kl_initial=_kl(candidates, initial_logps),
        kl_initial_per_token=kl_per_token(candidates, initial_logps),
        kl_initial_k3=kl_k3(candidates, initial_logps),
        kl_initial_k3_per_token=kl_k3_per_token(candidates, initial_logprobs) if initial_logprobs else None,
        entropy=sampled_entropy(candidates),
        distinct_1=distinct_n(candidates, 1),
        distinct_3=distinct_n(candidates, 3),
        seq_rep_4=seq_rep_n(candidates, 4),
        truncated_rate=float(np.mean([candidate.finish_reason == "length" for candidate in candidates])),
        gold=None if golds is None else float(golds.mean()),
        gold_low=gold_low,
        gold_high=gold_high,
        gold_unscored=sum(score.value is None for score in gold) if gold else None,
        **(win_rates or {}),
    )


def _prompt_means(
    prompts: Sequence[Prompt], candidates: Sequence[Candidate], scores: Sequence[Score], scorer: str = "scoring"
) -> Values:
    """[prompts with a scored completion] mean scores by the scorer of that option."""
    groups = group_by_prompt(prompts, candidates, scores)
    values = [[score.value for score in group.scores if score.value is not None] for group in groups]
    means = np.array([np.mean(group) for group in values if group], dtype=np.float64)
    if means.size == 0:
        reasons = sorted({score.reason for score in scores})
        raise ScorerError(
            f"0 of {len(candidates)} held-out completions were scored, at least 1 is needed; reasons: {reasons}. "
            f"Fix the function of {scorer} or raise {scorer}.timeout_s"
        )
    return means


def with_gold(scores: Sequence[Score], gold: Sequence[Score]) -> list[Score]:
    """The scores with the gold scorer's value, where it gave one, as a part named `evaluation.gold`, and its reason."""
    if not gold:
        return list(scores)
    return [
        score if own.value is None else _beside(score, own, own.value) for score, own in zip(scores, gold, strict=True)
    ]


def _beside(score: Score, gold: Score, value: float) -> Score:
    """Of a composition the reasons of its members, each behind its name."""
    told = "\n".join([*filter(None, [gold.reason]), *(f"{name}: {said}" for name, said in gold.part_reasons.items())])
    reasons = {**score.part_reasons, **({GOLD: told} if told else {})}
    return replace(score, parts={**score.parts, GOLD: value}, part_reasons=reasons)


def _kl(candidates: Sequence[Candidate], logps: Sequence[float]) -> float | None:
    if not logps:
        return None
    return float(np.mean([sum(c.logprobs) - logp for c, logp in zip(candidates, logps, strict=True)]))


class Resampling(Protocol):
    """How an interval is drawn; a block of either kind of evaluation has both."""

    @property
    def bootstrap_samples(self) -> int: ...
    @property
    def confidence(self) -> float: ...


def mean_interval(values: Values, block: Resampling, seed: int) -> tuple[float, float]:
    """Bounds of the mean at `confidence`, by percentile bootstrap; both are the mean when the values do not differ."""
    if np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    draws = np.random.default_rng(seed).integers(0, len(values), (block.bootstrap_samples, len(values)))
    tail = (1 - block.confidence) / 2
    low, high = np.quantile(values[draws].mean(axis=1), (tail, 1 - tail))
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Made by the trainers' `evaluate`, read by recipes and reports.

    `metrics` are means over all preferences, under the names of training. The others are per preference, in the order
    that was given: `losses`, and the rewards of the best and the worst candidate (implicit ones of a policy, those of
    a reward model), which are one and the same for a demonstration of one candidate.
    """

    metrics: Mapping[str, float]
    losses: tuple[float, ...]
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]


Metric = Literal["rewards/accuracies", "loss"]


class Measured(Protocol):
    """What the trainer says of held-out rows; `losses`, `chosen` and `rejected` (rewards) are per row."""

    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def losses(self) -> Sequence[float]: ...
    @property
    def chosen(self) -> Sequence[float]: ...
    @property
    def rejected(self) -> Sequence[float]: ...


def held_out_evaluation(
    measured: Measured, metric: Metric, block: HeldOutBlock, seed: int, more: Mapping[str, float] = MappingProxyType({})
) -> HeldOutEvaluation:
    """Sum up held-out rows by `metric`: the share of pairs ranked rightly, or the mean loss per row.

    `more` are further metrics of the same rows.

    Equal rewards are half right: a policy that equals its reference ranks nothing, which is a coin's 1/2. The interval
    of that share is `share_interval`, that of the loss the percentile bootstrap over rows, drawn with `seed`.
    """
    values: Values
    if metric == "rewards/accuracies":
        values = _accuracies(measured)
        low, high = map(float, share_interval(values, block.confidence))
    else:
        values = np.asarray(measured.losses)
        low, high = mean_interval(values, block, seed)
    value = float(values.mean())
    return HeldOutEvaluation(metric, value, low, high, len(values), {**measured.metrics, **more, metric: value})


def _accuracies(measured: Measured) -> Values:
    chosen, rejected = np.asarray(measured.chosen), np.asarray(measured.rejected)
    return np.where(chosen == rejected, 0.5, (chosen > rejected).astype(np.float64))
