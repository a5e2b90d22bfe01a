"""The records that pass between roles. Frozen; the contract of the whole platform.

Token ids are the only truth about a completion: they travel from vLLM to the trainer untouched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation to answer. Made by `raylign.prompts`, read by every role.

    `token_ids` is the chat template applied to `messages`, generation prompt included.
    `id` is ours (never derived from user text) and unique within a run.
    """

    id: str
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sampled completion. Made by a generator, read by scorers, pairing and the trainer.

    `logprobs[t]` is the sampler's log-probability (nats, temperature 1) of `token_ids[t]`; the two have equal
    length. An answer from a data set (made by `raylign.data.tokens`) has no `logprobs`, version 0 and seed 0.
    `index` is 0..K-1 within its prompt. `finish_reason` "length" means truncated: no EOS is in
    `token_ids`, and none is ever added. `policy_version` is the version that sampled every token.
    """

    prompt_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_version: int
    seed: int


@dataclass(frozen=True, slots=True)
class Score:
    """What a scorer says of one candidate; higher is better. Made by scorers, read by pairing and evaluation.

    `value` None means unscored, and `reason` then says why; beside a value it is the scorer's reason for that, where it
    gives one. `parts` holds the named components of the value, `part_reasons` the reasons for some of them.
    """

    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    part_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KlSample:
    """A completion on which KL(pi || pi_ref) is estimated: never compared, chosen or rejected.

    Made by `raylign.pairing.kl_samples`, read by the trainer. It need not belong to the prompt of the preference that
    carries it. `sampler_logp` and `reference_logp` are summed log-probabilities (nats) under the policy that sampled it
    (0 where nobody did) and under the reference (None until the reference stage has filled it).
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    sampler_logp: float = 0.0
    reference_logp: float | None = None


@dataclass(frozen=True, slots=True)
class Preference:
    """Candidates of one prompt in order best..worst: a pair, a ranking, or the whole group. Made by `raylign.pairing`.

    All but `kl_sample` run parallel to `candidates`. `weights` scale each candidate's share of the loss (1 = full):
    their mean multiplies the loss of the preference. The reference stage fills the rest, which is empty until then:
    `reference_logps[i]` is the summed log-probability (nats) of candidate i under the reference;
    `reference_logprobs[i][t]` that of its token t, where the loss asks (`needs_reference_tokens`); `old_logprobs[i][t]`
    the same under the policy as the round found it, where the loss asks (`needs_samples`) and the round takes several
    steps. `kl_sample` is there where the loss asks for one (`needs_kl_sample`).
    """

    prompt: Prompt
    candidates: tuple[Candidate, ...]
    scores: tuple[float, ...]
    weights: tuple[float, ...]
    reference_logps: tuple[float, ...] = ()
    kl_sample: KlSample | None = None
    reference_logprobs: tuple[tuple[float, ...], ...] = ()
    old_logprobs: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class ReferenceLogps:
    """Log-probs (nats) of one preference under the reference. Made by trainers, put into it by `with_reference`.

    Sums of its candidates and of its KL sample (None without one); `tokens[i][t]` where the loss asks for them.
    """

    candidates: tuple[float, ...]
    kl_sample: float | None = None
    tokens: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out quality of one policy version. Made by `raylign.evaluation.held_out`, read by reports and tracking.

    `score_low`/`score_high` bound the mean score (bootstrap over prompts). `kl` is the mean over completions of
    log pi(y|x) - log pi_ref(y|x) in nats, pi_ref the reference that the version was trained with; `kl_initial` is the
    same against the policy before round 1, Schulman's estimator k1, `kl_initial_k3` his k3 of the same sequences, and
    `kl_initial_per_token` and `kl_initial_k3_per_token` both over tokens. None where there is no such policy to ask.
    `length` is in tokens; the rates lie in 0..1. `entropy` is in nats a token, estimated by the tokens that were
    sampled; `raylign.evaluation.health` has the equations.

    `gold` is the mean of the gold scorer, as `score` is of the scorer, with its bounds and the completions it left
    unscored; None without one.

    `win_rate` is the share of wins over the policy before round 1 on the same prompts, a tie being half a win;
    `win_rate_length_controlled` the same at equal lengths, and `win_rate_previous` over the version of the round before
    (`raylign.evaluation.win_rate`). They are None before round 1, and where they were not asked for. Of the recipe
    `evaluate` it is the rate over the first opponent; `win_rates` has those over all, as `win_rate_low/NAME`.

    `capability` has what `raylign.evaluation.capability` measured of this version, if it did.
    """

    score: float
    score_low: float
    score_high: float
    kl: float | None
    length: float
    distinct_2: float
    eos_rate: float
    completions: int
    unscored: int
    kl_initial: float | None = None
    kl_initial_per_token: float | None = None
    kl_initial_k3: float | None = None
    entropy: float | None = None
    distinct_1: float | None = None
    distinct_3: float | None = None
    seq_rep_4: float | None = None
    truncated_rate: float | None = None
    gold: float | None = None
    gold_low: float | None = None
    gold_high: float | None = None
    gold_unscored: int | None = None
    win_rate: float | None = None
    win_rate_low: float | None = None
    win_rate_high: float | None = None
    win_rate_length_controlled: float | None = None
    win_rate_length_controlled_low: float | None = None
    win_rate_length_controlled_high: float | None = None
    win_rate_previous: float | None = None
    win_rate_previous_low: float | None = None
    win_rate_previous_high: float | None = None
    capability: Mapping[str, float] = field(default_factory=dict)
    win_rates: Mapping[str, float] = field(default_factory=dict)
    kl_initial_k3_per_token: float | None = None


@dataclass(frozen=True, slots=True)
class HeldOutEvaluation:
    """Held-out rows of a data set under one policy version; nothing is sampled. Made by `raylign.evaluation.held_out`.

    `metric` names the value that sums it up, `low`/`high` bound it (bootstrap over rows). `metrics` has TRL's metrics,
    means over the rows or their tokens. `capability` is that of `Evaluation`.
    """

    metric: str
    value: float
    low: float
    high: float
    rows: int
    metrics: Mapping[str, float]
    capability: Mapping[str, float] = field(default_factory=dict)


AnyEvaluation = Evaluation | HeldOutEvaluation


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What one round did. Made by the recipe, written as `report.json`, read by tracking and `review`.

    `counts` has preferences, and of a round with samples what became of the others (`raylign.pairing`).
    `steps` has one mapping of TRL metric names to values per optimizer step. `seconds` is wall time per stage. `sync`
    has the canary's gaps, if weights were published. `scoring` is what scoring the candidates took, as `scorer/metric`.
    `health` has what training did to the pairs as a whole, by name (`raylign.evaluation.health.round_health`).
    """

    index: int
    policy_version: int
    counts: Mapping[str, int]
    steps: tuple[Mapping[str, float], ...]
    sync: Mapping[str, float]
    evaluation: AnyEvaluation
    seconds: Mapping[str, float]
    scoring: Mapping[str, float] = field(default_factory=dict)
    health: Mapping[str, float] = field(default_factory=dict)


TokenLogps = list[list[list[float]]]
"""Log-probs (nats) of completions under a policy, by row, completion and token."""


@dataclass(frozen=True, slots=True)
class Completions:
    """A prompt and completions of it, as token ids that are taken as they are."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
