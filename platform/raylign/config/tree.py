"""What every recipe's tree has, with the rules that span its blocks."""

from abc import abstractmethod
from typing import Self

from pydantic import model_validator

from raylign.config.base import Block
from raylign.config.blocks import ModelBlock, PlacementBlock, RecoveryBlock, RunBlock, TrackingBlock, TrainerBlock


class RunConfig(Block):
    """One recipe. Pass its blocks to functions, never the tree."""

    recipe: str
    """Which recipe it is; `raylign.config.load.RECIPES` has them all."""
    run: RunBlock = RunBlock()
    model: ModelBlock = ModelBlock()
    trainer: TrainerBlock = TrainerBlock()
    placement: PlacementBlock = PlacementBlock()
    recovery: RecoveryBlock = RecoveryBlock()
    tracking: TrackingBlock = TrackingBlock()

    @property
    @abstractmethod
    def rounds(self) -> int:
        """Rounds of the whole campaign; each ends with a checkpoint, an evaluation and a report."""

    @model_validator(mode="after")
    def four_bits_need_an_adapter(self) -> Self:
        if not self.model.load_in_4bit:
            return self
        if self.model.lora is None:
            raise ValueError("model.load_in_4bit needs model.lora: 4-bit weights cannot be trained")
        if self.trainer.zero_stage == 3:
            raise ValueError("model.load_in_4bit cannot be sharded by trainer.zero_stage=3; use 0, 1 or 2")
        return self

    @model_validator(mode="after")
    def offload_needs_zero(self) -> Self:
        stage, offload = self.trainer.zero_stage, self.trainer.offload
        if offload.param and stage != 3:
            raise ValueError(f"trainer.offload.param needs trainer.zero_stage=3, not {stage}")
        if offload.optimizer and stage == 0:
            raise ValueError("trainer.offload.optimizer needs trainer.zero_stage 1, 2 or 3, not 0")
        return self
