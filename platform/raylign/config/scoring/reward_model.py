"""Scores from a reward model."""

from typing import Literal

from pydantic import Field

from raylign.config.scoring.model import ModelScoringBlock


class RewardModelScoringBlock(ModelScoringBlock):
    """Scores from a sequence classifier of transformers with one output.

    It reads the conversation with the completion as the last message, by its own tokenizer and chat template.
    """

    type: Literal["reward_model"] = "reward_model"
    path: str = Field(min_length=1)
    """A local folder, such as `raylign export` writes, or a hub id: a whole model, or a PEFT adapter (SEQ_CLS)."""
    revision: str | None = None
    """Hub revision; pin it for repeatable runs."""
