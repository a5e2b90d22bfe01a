"""The trees of the recipes that train on a data set: no generators, no scorer."""

from abc import abstractmethod
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from raylign.config.base import Block
from raylign.config.blocks import RunBlock, RunName
from raylign.config.capability import CapabilityBlock
from raylign.config.data import DataBlock
from raylign.config.evaluation import OF_ANSWERS, OF_PAIRS, OF_REWARDS, ChoiceBlock
from raylign.config.guard import (
    GuardRule,
    GuardUnion,
    asked_for,
    require_displaceable,
    require_known,
    require_raisable,
)
from raylign.config.losses import (
    BradleyTerryRewardLossBlock,
    LossUnion,
    RewardLossUnion,
    SftLossBlock,
    SigmoidLossBlock,
    TrainerLoss,
)
from raylign.config.reference import (
    InitialReferenceBlock,
    NoReferenceBlock,
    ReferenceBlock,
    ReferenceUnion,
    SamplerReferenceBlock,
    require_reference,
)
from raylign.config.tree import RunConfig

Rows = Literal["pairs", "rankings", "demonstrations"]


class OfflineScheduleBlock(Block):
    """How often the data set is gone through."""

    num_train_epochs: PositiveInt = 1
    """Passes over the training rows, each in a new order."""
    rounds_per_epoch: PositiveInt = 1
    """An epoch is cut into this many rounds; each ends with a checkpoint and an evaluation."""


class HeldOutBlock(ChoiceBlock):
    """Evaluation on held-out rows, before round 1 and after every round."""

    bootstrap_samples: PositiveInt = 1000
    """Resamples for the interval."""
    confidence: float = Field(0.95, gt=0.0, lt=1.0)
    capability: CapabilityBlock | None = None
    """What the policy still knows beside what it is trained for; null measures none of it."""


class OfflineConfig(RunConfig):
    """What recipes on a data set share."""

    data: DataBlock
    schedule: OfflineScheduleBlock = OfflineScheduleBlock()
    evaluation: HeldOutBlock = HeldOutBlock()
    guard: tuple[GuardUnion, ...] = ()
    """Rules that are looked at after every round; what they raise holds from the next round on."""

    @property
    @abstractmethod
    def rows(self) -> Rows:
        """What a row of the data set is to this recipe."""

    @property
    @abstractmethod
    def measures(self) -> tuple[str, ...]:
        """What rules and the choice of the best version may read."""

    @property
    def mismatched(self) -> bool:
        """Whether every row carries an answer of another row, to estimate a KL on."""
        return False

    @property
    def rounds(self) -> int:
        return self.schedule.num_train_epochs * self.schedule.rounds_per_epoch

    @property
    def measured_against(self) -> ReferenceBlock:
        return NoReferenceBlock()

    @property
    def source(self) -> tuple[str, str]:
        return "data.source", self.data.source

    @property
    def longest(self) -> tuple[str, int]:
        return "data.max_length", self.data.max_length

    @property
    def capability(self) -> CapabilityBlock | None:
        return self.evaluation.capability

    @property
    def confidence(self) -> float:
        return self.evaluation.confidence

    @property
    def rules(self) -> tuple[GuardRule, ...]:
        return self.guard

    @property
    def choice(self) -> ChoiceBlock | None:
        return None if self.evaluation.metric_for_best_model is None else self.evaluation

    @property
    def score_options(self) -> tuple[str, ...]:
        """Options of its loss that read more of scores than their order in a row."""
        return self.objective.score_options

    @model_validator(mode="after")
    def the_guard_finds_what_it_reads_and_raises(self) -> Self:
        names = asked_for(self.guard, self.evaluation)
        require_known(names, self.measures, type(self).model_fields["recipe"].default)
        require_displaceable(names, self.objective)
        require_raisable(self.guard, self.objective)
        return self

    @model_validator(mode="after")
    def the_schedule_has_the_epochs(self) -> Self:
        if self.trainer.num_train_epochs != 1:
            raise ValueError(
                f"trainer.num_train_epochs={self.trainer.num_train_epochs} would go over each round's rows again; "
                "set schedule.num_train_epochs for passes over the data set"
            )
        return self


class OfflineDpoRunBlock(RunBlock):
    """`RunBlock` with a name of its own."""

    name: RunName = "offline-dpo"


class OfflineDpoConfig(OfflineConfig):
    """Preference losses on a data set."""

    recipe: str = "offline_dpo"
    run: OfflineDpoRunBlock = OfflineDpoRunBlock()
    loss: LossUnion = SigmoidLossBlock()
    reference: ReferenceUnion = InitialReferenceBlock()

    @property
    def objective(self) -> TrainerLoss:
        return self.loss

    @property
    def measured_against(self) -> ReferenceBlock:
        return self.reference

    @property
    def rows(self) -> Rows:
        return "pairs" if self.loss.pairs_only else "rankings"

    @property
    def measures(self) -> tuple[str, ...]:
        return OF_PAIRS

    @property
    def mismatched(self) -> bool:
        return self.loss.needs_kl_sample

    @model_validator(mode="after")
    def the_loss_gets_the_reference_it_reads(self) -> Self:
        require_reference(self.loss, self.reference)
        return self

    @model_validator(mode="after")
    def nobody_sampled_the_answers(self) -> Self:
        if isinstance(self.reference, SamplerReferenceBlock):
            raise ValueError(
                "reference.policy=sampler needs the log-probs of a sampling policy, which a data set does not have; "
                "set reference.policy=initial"
            )
        if self.loss.needs_reference_samples:
            raise ValueError(
                f"loss.loss_type={self.loss.loss_type} has xpo, a bonus on samples of the reference, which a data set "
                "does not have; leave xpo out, or use the recipe online_dpo"
            )
        if self.loss.needs_samples:
            raise ValueError(
                f"loss.loss_type={self.loss.loss_type} weighs samples of the policy by the log-probs they were sampled "
                "with, which a data set does not have; use the recipe online_dpo, or a loss such as sigmoid"
            )
        if self.loss.needs_kl_gradient:
            raise ValueError(
                f"loss.loss_type={self.loss.loss_type} has kl, a mean over samples of the policy, which a data set "
                "does not have; leave kl out (a higher beta holds the policy nearer to its reference), or use the "
                "recipe online_dpo"
            )
        return self


class SftRunBlock(RunBlock):
    """`RunBlock` with a name of its own."""

    name: RunName = "sft"


class SftConfig(OfflineConfig):
    """Supervised fine-tuning on demonstrations, or on the chosen answers of preferences."""

    recipe: str = "sft"
    run: SftRunBlock = SftRunBlock()
    loss: SftLossBlock = SftLossBlock()

    @property
    def objective(self) -> TrainerLoss:
        return self.loss

    @property
    def rows(self) -> Rows:
        return "demonstrations"

    @property
    def measures(self) -> tuple[str, ...]:
        return OF_ANSWERS


class RewardModelRunBlock(RunBlock):
    """`RunBlock` with a name of its own."""

    name: RunName = "reward-model"


class CalibratedHeldOutBlock(HeldOutBlock):
    """Evaluation of a reward model, with a reliability diagram."""

    bins: PositiveInt = 10
    """Bins of confidence from 1/2 to 1."""


class RewardModelConfig(OfflineConfig):
    """A reward model from preferences."""

    recipe: str = "reward_model"
    run: RewardModelRunBlock = RewardModelRunBlock()
    loss: RewardLossUnion = BradleyTerryRewardLossBlock()
    evaluation: CalibratedHeldOutBlock = CalibratedHeldOutBlock()

    @property
    def objective(self) -> TrainerLoss:
        return self.loss

    @property
    def rows(self) -> Rows:
        return "pairs" if self.loss.pairs_only else "rankings"

    @property
    def measures(self) -> tuple[str, ...]:
        return OF_REWARDS

    @model_validator(mode="after")
    def a_reward_model_knows_no_texts(self) -> Self:
        if self.evaluation.capability is not None:
            raise ValueError(
                "evaluation.capability asks a policy for the probability of texts, and a reward model gives none; "
                "leave the block out"
            )
        return self
