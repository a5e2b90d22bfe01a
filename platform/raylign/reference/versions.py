"""Which policy version the reference is, round by round, how it follows the policy, and the sampler as reference."""

import math
from dataclasses import dataclass
from typing import assert_never

import numpy as np

from raylign.config.reference import (
    EmaReferenceBlock,
    EveryReferenceBlock,
    InitialReferenceBlock,
    ModelReferenceBlock,
    NoReferenceBlock,
    PreviousRoundReferenceBlock,
    ReferenceBlock,
    SamplerReferenceBlock,
)
from raylign.records import Preference


def reference_version(block: ReferenceBlock, rounds_done: int) -> int | None:
    """The policy version that is the reference while `rounds_done` rounds are done: its samples are the reference's.

    None for a reference that no policy version is.
    """
    match block:
        case InitialReferenceBlock():
            return 0
        case PreviousRoundReferenceBlock() | SamplerReferenceBlock():
            return rounds_done
        case EveryReferenceBlock():
            return rounds_done - rounds_done % block.n
        case EmaReferenceBlock() | ModelReferenceBlock() | NoReferenceBlock():
            return None
        case _:
            assert_never(block)


def is_new_reference(block: ReferenceBlock, rounds_done: int) -> bool:
    """Whether the round after `rounds_done` has another reference than the round before it; the first one always."""
    if rounds_done == 0 or isinstance(block, EmaReferenceBlock):
        return True
    return reference_version(block, rounds_done) != reference_version(block, rounds_done - 1)


def is_initial_reference(block: ReferenceBlock, rounds_done: int) -> bool:
    """Whether the reference of the round after `rounds_done` is known to be the policy before round 1."""
    return reference_version(block, rounds_done) == 0 or (isinstance(block, EmaReferenceBlock) and rounds_done == 0)


@dataclass(frozen=True, slots=True)
class Pace:
    """Every how many rounds the reference takes which share of the policy."""

    share: float
    every: int

    def is_due(self, rounds: int) -> bool:
        return rounds > 0 and rounds % self.every == 0


def pace(block: ReferenceBlock) -> Pace | None:
    """None for a reference that stays where it is."""
    match block:
        case PreviousRoundReferenceBlock():
            return Pace(1.0, 1)
        case EveryReferenceBlock():
            return Pace(1.0, block.n)
        case EmaReferenceBlock():
            return Pace(block.alpha, 1)
        case _:
            return None


def sampler_logps(preference: Preference, tail_weight: float = 1.0) -> tuple[float, ...]:
    """Summed log-probs (nats) of the candidates under the policy that sampled them, which is then the reference.

    Tokens beyond the group's shortest completion weigh `tail_weight` in fp32, as in `raylign.losses.ld_weights`.
    """
    shared = min(len(candidate.token_ids) for candidate in preference.candidates)
    tail = float(np.float32(tail_weight))
    return tuple(
        math.fsum(logp * (1.0 if place < shared else tail) for place, logp in enumerate(candidate.logprobs))
        for candidate in preference.candidates
    )
