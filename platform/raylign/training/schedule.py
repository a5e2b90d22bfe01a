"""The learning rate of every optimizer step of a campaign."""

import math

from raylign.config.blocks import TrainerBlock


def learning_rate(step: int, total_steps: int, block: TrainerBlock) -> float:
    """Rate of step `step` (0-based): linear warm-up, then linear, cosine or no decay to 0 at `total_steps`.

    Equal to transformers' get_linear/cosine/constant_schedule_with_warmup.
    """
    if step < block.warmup_steps:
        return block.learning_rate * step / block.warmup_steps
    if block.lr_scheduler_type == "constant":
        return block.learning_rate
    progress = (step - block.warmup_steps) / max(1, total_steps - block.warmup_steps)
    remaining = max(0.0, 1.0 - progress)
    if block.lr_scheduler_type == "linear":
        return block.learning_rate * remaining
    return block.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def steps_per_round(preferences: int, block: TrainerBlock) -> int:
    """Optimizer steps over `preferences`, all epochs; the last batch of an epoch may be smaller."""
    return block.num_train_epochs * math.ceil(preferences / block.train_batch_size)


def planned_steps(preferences_per_round: int, rounds: int, block: TrainerBlock) -> int:
    """Optimizer steps if every round gives as many preferences as it can; the schedule decays over these."""
    return rounds * steps_per_round(preferences_per_round, block)
