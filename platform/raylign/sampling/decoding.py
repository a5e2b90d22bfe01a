"""How completions are drawn, as generators see it, and the seeds that make a draw repeatable."""

import hashlib
from dataclasses import dataclass

from raylign.config.blocks import SamplingBlock
from raylign.config.evaluation import EvaluationBlock

_MAX_SEED = 1 << 31


@dataclass(frozen=True, slots=True)
class Decoding:
    """One request's options: `num_generations` completions of at most `max_new_tokens` tokens each.

    The last `reference_generations` of them come from the model without its adapter.
    """

    num_generations: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    reference_generations: int = 0


def training_decoding(sampling: SamplingBlock) -> Decoding:
    """K candidates per prompt, for preferences."""
    return Decoding(
        num_generations=sampling.num_generations,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        reference_generations=sampling.reference_generations,
    )


def evaluation_decoding(sampling: SamplingBlock, evaluation: EvaluationBlock) -> Decoding:
    """Held-out completions: the whole distribution at the evaluation temperature, so that KL is unbiased at 1."""
    return Decoding(
        num_generations=evaluation.num_generations,
        max_new_tokens=sampling.max_new_tokens,
        temperature=evaluation.temperature,
        top_p=1.0,
        top_k=0,
    )


def policy_versions(decoding: Decoding, version: int) -> tuple[int, ...]:
    """Who samples each candidate of a prompt, in index order: `version`, then 0 for the model without its adapter."""
    own = decoding.num_generations - decoding.reference_generations
    return (version,) * own + (0,) * decoding.reference_generations


def prompt_seed(run_seed: int, round_index: int, prompt_id: str) -> int:
    """Seed of one prompt's request; candidate i uses seed + i. Independent of which generator serves it."""
    digest = hashlib.sha256(f"{run_seed}/{round_index}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % _MAX_SEED
