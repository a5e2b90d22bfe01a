"""What every recipe's tree has, with the rules that span its blocks."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Self

from pydantic import model_validator

from raylign.config.base import Block
from raylign.config.blocks import ModelBlock, PlacementBlock, RecoveryBlock, RunBlock, TrackingBlock, TrainerBlock
from raylign.config.capability import CapabilityBlock
from raylign.config.evaluation import ChoiceBlock
from raylign.config.guard import GuardRule
from raylign.config.losses import RewardLossBlock, TrainerLoss
from raylign.config.reference import ReferenceBlock
from raylign.config.scoring import ScoringBlock


class RunConfig(Block):
    """One recipe. Pass its blocks to functions, never the tree."""

    recipe: str
    """Which recipe it is: a script of ours (`raylign.config.load.RECIPES`), or `module:NAME` of somebody else's."""
    run: RunBlock = RunBlock()
    model: ModelBlock = ModelBlock()
    trainer: TrainerBlock = TrainerBlock()
    placement: PlacementBlock = PlacementBlock()
    recovery: RecoveryBlock = RecoveryBlock()
    tracking: TrackingBlock = TrackingBlock()

    @property
    @abstractmethod
    def rounds(self) -> int:
        """Rounds of the whole run; each ends with a checkpoint, an evaluation and a report."""

    @property
    @abstractmethod
    def objective(self) -> TrainerLoss:
        """What the trainers minimise; it says too whether they train a policy or a reward model."""

    @property
    @abstractmethod
    def measured_against(self) -> ReferenceBlock:
        """The reference of log-ratios and KL."""

    @property
    @abstractmethod
    def source(self) -> tuple[str, str]:
        """The option that names the rows, and its value."""

    @property
    @abstractmethod
    def longest(self) -> tuple[str, int]:
        """The option that bounds sequences, and their tokens at most."""

    @property
    @abstractmethod
    def confidence(self) -> float:
        """Of the intervals of its evaluations."""

    @property
    def capability(self) -> CapabilityBlock | None:
        """What is measured of the policy beside what it is trained for; None where nothing is."""
        return None

    @property
    def max_completion_tokens(self) -> int | None:
        """Where sampling stops; None where nothing is sampled."""
        return None

    @property
    def on_policy(self) -> bool:
        """Whether rounds train on the policy's own samples, which only that policy could give again."""
        return False

    @property
    def scores_by_model(self) -> bool:
        """Whether a scorer is a model that torch computes."""
        return False

    @property
    def rules(self) -> tuple[GuardRule, ...]:
        """What watches the policy after every round."""
        return ()

    @property
    def choice(self) -> ChoiceBlock | None:
        """By what the best version is chosen; None where none is."""
        return None

    @property
    def scored_parts(self) -> Mapping[str, ScoringBlock]:
        """Who scores, by the name of the part of a score, the whole under the empty name; none where nothing does."""
        return {}

    @property
    def trains_rewards(self) -> bool:
        """Whether what comes out is a reward model."""
        return isinstance(self.objective, RewardLossBlock)

    @model_validator(mode="after")
    def the_recipe_is_one_of_this_tree(self) -> Self:
        own = type(self).model_fields["recipe"].default
        if self.recipe != own and ":" not in self.recipe:
            raise ValueError(f"recipe={self.recipe}: these are the settings of {own}; correct recipe, or leave it out")
        return self

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
