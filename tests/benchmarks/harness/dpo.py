"""What the contestants of `dpo_step` get and give, and how far their losses may differ."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Literal

from raylign.config.base import Block
from raylign.config.blocks import LoraBlock
from raylign.training.batches import BatchShape, plan_steps
from tests.benchmarks.harness.pairs import TokenPair

_TOKEN_NOISE = 0.05
"""Standard deviation (nats) of a token's log-prob in bf16 around its value in fp32. SmolLM2 on this task: 0.047 packed,
0.045 padded. bf16 keeps 8 bits, so logits of 16 to 32 come in steps of 1/8, which alone gives 0.036."""
_SIGMAS = 3.0


class DpoJob(Block):
    """`warm_up` pairs are a first step that is reported apart; `steady` pairs are what the rates are of.

    A step has `batch` pairs, `micro_batch` of them at a time. Both contestants compute in `dtype`, on fp32 weights or
    masters unless `trl_dtype` says otherwise for TRL, whose reference log-probs are made ahead if `precomputed` and
    whose layers are Liger's if `trl_liger`.
    What is trained goes into `saved`; with `wide_products`, hosts without bf16 instructions multiply in fp32.
    """

    folder: str
    tokenizer: str
    pad_id: int
    warm_up: tuple[TokenPair, ...]
    steady: tuple[TokenPair, ...]
    batch: int
    micro_batch: int
    learning_rate: float
    beta: float
    threads: int
    on_gpu: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    precomputed: bool = False
    trl_dtype: Literal["bfloat16", "float32"] = "float32"
    trl_attention: str = "sdpa"
    trl_liger: bool = False
    lora: LoraBlock | None = None
    load_in_4bit: bool = False
    saved: str | None = None
    wide_products: bool = False


class DpoResult(Block):
    """One contestant's curves, with the first step, and its seconds.

    `reference_s` is the part of `steady_s` that the reference pass took; 0 when it was made ahead, None where it is not
    done apart. `num_tokens` is the contestant's own count of real tokens.
    """

    losses: tuple[float, ...]
    margins: tuple[float, ...]
    first_s: float
    steady_s: float
    reference_s: float | None
    num_tokens: int
    settings: dict[str, str | int | float | bool | None]


class RateJob(Block):
    """Measure the bf16 matmul rate with the shapes of the model of `folder` on `tokens` rows."""

    folder: str
    tokens: int
    threads: int
    on_gpu: bool


class RateResult(Block):
    """Operations a second."""

    flops: float


def planned_steps(job: DpoJob, pairs: Sequence[TokenPair], seed: int) -> list[list[TokenPair]]:
    """The steps that raylign's trainer takes over `pairs` with `seed`."""
    shape = BatchShape(1, job.batch, job.micro_batch, 1 << 30)
    plan = plan_steps([pair.real_tokens for pair in pairs], shape, epochs=1, seed=seed)
    return [[pairs[index] for micro in step.micro_batches[0] for index in micro.indices] for step in plan]


def in_planned_order(job: DpoJob) -> DpoJob:
    """The job with its pairs in the order in which raylign's trainer takes them, for a contestant that keeps theirs."""
    parts = {"warm_up": planned_steps(job, job.warm_up, 0), "steady": planned_steps(job, job.steady, 1)}
    return job.model_copy(update={name: tuple(chain.from_iterable(steps)) for name, steps in parts.items()})


def loss_tolerances(steps: Sequence[Sequence[TokenPair]], beta: float) -> list[float]:
    """How far bf16 rounding alone may move the mean loss of each step apart in two correct implementations.

    Four log-probs of a pair's n completion tokens enter the difference of two margins (policy and reference, on both
    sides), each with the noise of its tokens; the loss moves by half of beta times that. Three standard deviations.
    """
    return [
        _SIGMAS * beta / 2 * 2 * _TOKEN_NOISE * math.sqrt(sum(_completion_tokens(pair) for pair in step)) / len(step)
        for step in steps
    ]


def _completion_tokens(pair: TokenPair) -> int:
    return len(pair.chosen) + len(pair.rejected)
