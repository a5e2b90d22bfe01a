"""Proof that what vLLM serves is what the trainer holds: log-probs of fixed tokens from both."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raylign.errors import WeightSyncError
from raylign.roles import Engines, Generator, Trainers


@dataclass(frozen=True, slots=True)
class Canary:
    """Fixed token ids, each list a prompt of two tokens or more, and the largest mean gap (nats) that passes."""

    token_ids: tuple[tuple[int, ...], ...]
    max_gap: float

    def check(self, trainers: Trainers, generators: Engines, timeout_s: float) -> Mapping[str, float]:
        """`logprob_gap_mean` and `logprob_gap_max` (absolute, nats) over all tokens and generators.

        Raises WeightSyncError when the mean exceeds the limit.
        """
        expected = trainers.token_logps(self.token_ids)
        gaps = []
        for ids, logps in zip(self.token_ids, expected, strict=True):
            for served in generators.call("canary", timeout_s, Generator.token_logps, ids):
                gaps.append(_gaps(logps, served))
        means = [sum(gap) / len(gap) for gap in gaps]
        worst = max(means, key=lambda mean: math.inf if math.isnan(mean) else mean)
        if not worst <= self.max_gap:
            raise WeightSyncError(
                f"canary: vLLM's log-probs differ from the trainer's by {worst:.4f} nats a token, limit "
                f"{self.max_gap:g}; the generators do not serve the trainer's weights. If the model is very deep or "
                "quantised, measure the gap of version 0 and raise generators.weight_sync.canary_max_gap"
            )
        flat = [gap for group in gaps for gap in group]
        return {"logprob_gap_mean": sum(flat) / len(flat), "logprob_gap_max": max(flat)}


def _gaps(expected: Sequence[float], served: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(expected, served, strict=True)]
