"""The learning rate of every optimizer step of a run."""

import math
from dataclasses import dataclass

from raylign.config.blocks import TrainerBlock
from raylign.errors import TrainerError


@dataclass(slots=True)
class Schedule:
    """Linear warm-up from 0, then linear, cosine or no decay to 0 at the end of the last of `rounds` rounds.

    How many steps a round takes is known when its preferences are there, so the decay goes by places in the run,
    counted in rounds: 1.5 is the middle of the second. Each round takes the same share of the decay, and where all take
    equally many steps, the rates are those of transformers' get_linear/cosine/constant_schedule_with_warmup.
    """

    block: TrainerBlock
    rounds: int
    warm_at: float = 0.0
    """The place where warm-up ended, or has come to; a checkpoint keeps it."""

    def rate(self, steps_done: int, place: float) -> float:
        """Rate of the step at `place`, after `steps_done` others. Raises TrainerError where the decay has ended."""
        block = self.block
        if steps_done <= block.warmup_steps:
            self.warm_at = place
        if steps_done < block.warmup_steps:
            return block.learning_rate * steps_done / block.warmup_steps
        if block.lr_scheduler_type == "constant":
            return block.learning_rate
        if place >= self.rounds:
            raise TrainerError(f"a step of round {int(place) + 1}, and the run has {self.rounds}; raise its rounds")
        progress = (place - self.warm_at) / (self.rounds - self.warm_at)
        if block.lr_scheduler_type == "linear":
            return block.learning_rate * (1.0 - progress)
        return block.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def steps_per_round(preferences: int, block: TrainerBlock) -> int:
    """Optimizer steps over `preferences`, all epochs; the last batch of an epoch may be smaller."""
    return block.num_train_epochs * math.ceil(preferences / block.train_batch_size)
