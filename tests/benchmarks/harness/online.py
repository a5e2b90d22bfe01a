"""What the contestants of `online_round` get and give."""

import time
from typing import Any

import psutil

from raylign.config.base import Block


class Stop(Block):
    """When a contestant starts no further round or step: after `count`, or where the next would pass `budget_s`.

    The next one is taken to last as long as the last. Start-up and held-out evaluation are not counted.
    """

    count: int | None = None
    budget_s: float | None = None

    def reached(self, durations: list[float]) -> bool:
        if self.count is not None:
            return len(durations) >= self.count
        assert self.budget_s is not None
        return bool(durations) and sum(durations) + durations[-1] > self.budget_s


class OnlineJob(Block):
    """`recipe` is the YAML file, `settings` its overrides: what raylign runs and what TRL's options are made from.

    The trained adapter goes to `adapter`. `threads` is the number of compute threads.
    """

    recipe: str
    settings: tuple[str, ...]
    stop: Stop
    trl_batch: int
    adapter: str
    work: str
    threads: int


class OnlineResult(Block):
    """`start_s`: until the first round or step; `seconds[i]`: the i-th one; `prompts`: in each of them.

    `stages` has what a contestant knows of where the time went, as totals of all rounds.
    """

    start_s: float
    seconds: tuple[float, ...]
    prompts: int
    stages: dict[str, float]
    settings: dict[str, str | int | float | bool | None]

    def prompts_a_second(self, warm_up: int = 1) -> float:
        """Without the first `warm_up` rounds or steps."""
        return self.prompts * (len(self.seconds) - warm_up) / sum(self.seconds[warm_up:])


class JudgeJob(Block):
    """Sample the held-out prompts of the recipe from every adapter (None: the model as it came) and score them."""

    recipe: str
    settings: tuple[str, ...]
    adapters: dict[str, str | None]
    samples: int
    threads: int


class JudgeResult(Block):
    """`raylign.records.Evaluation` of every adapter, as plain values."""

    evaluations: dict[str, dict[str, Any]]


def process_age_s() -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - float(psutil.Process().create_time())
