"""Sums of losses, and the union of every loss a recipe can name."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from raylign.config.base import Block
from raylign.config.losses.function import FunctionLossBlock
from raylign.config.losses.grpo import GroupLoss
from raylign.config.losses.listwise import ListLoss
from raylign.config.losses.pairwise import PairwiseLoss
from raylign.config.losses.reference_free import ReferenceFreeLoss
from raylign.config.losses.terms import EntropyLossBlock, KlLossBlock, SftLossBlock, Term, XpoLossBlock

Objective = PairwiseLoss | ReferenceFreeLoss | ListLoss | GroupLoss | SftLossBlock | FunctionLossBlock
Member = Objective | Term


class MixLossBlock(Block):
    """Weighted sum of losses, as TRL's loss_type list: sum_i loss_weights_i losses_i, with the rewards of the first."""

    loss_type: Literal["mix"] = "mix"
    losses: tuple[Annotated[Member, Field(discriminator="loss_type")], ...]
    """The members; the first one's beta scales the logged rewards."""
    loss_weights: tuple[PositiveFloat, ...] | None = None
    """One weight per member; null weighs each by 1."""

    @model_validator(mode="after")
    def members_fit_together(self) -> Self:
        names = [member.loss_type for member in self.losses]
        if not names or isinstance(self.losses[0], KlLossBlock | EntropyLossBlock | XpoLossBlock):
            raise ValueError(
                f"losses={names} must start with an objective such as sigmoid; put kl, entropy and xpo after it"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"losses={names} name one loss twice; keep one and add their loss_weights")
        if len(self.weights) != len(names):
            raise ValueError(
                f"loss_weights has {len(self.weights)} entries for {len(names)} losses; give one weight per loss"
            )
        if len({member.tail_weight for member in self.losses}) > 1:
            raise ValueError(
                f"losses={names} share their log-probs, so ld_alpha must be the same in all; "
                "sft, kl and other losses without ld_alpha go with null or 1"
            )
        return self

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0,) * len(self.losses) if self.loss_weights is None else self.loss_weights

    @property
    def needs_reference(self) -> bool:
        return any(member.needs_reference for member in self.losses)

    @property
    def pairs_only(self) -> bool:
        return any(member.pairs_only for member in self.losses)

    @property
    def needs_entropy_gradient(self) -> bool:
        return any(member.needs_entropy_gradient for member in self.losses)

    @property
    def needs_reference_samples(self) -> bool:
        return any(member.needs_reference_samples for member in self.losses)

    @property
    def needs_kl_baseline(self) -> bool:
        return any(member.needs_kl_baseline for member in self.losses)

    @property
    def needs_kl_gradient(self) -> bool:
        return any(member.needs_kl_gradient for member in self.losses)

    @property
    def needs_kl_sample(self) -> bool:
        return any(member.needs_kl_sample for member in self.losses)

    @property
    def needs_reward_shift(self) -> bool:
        return any(member.needs_reward_shift for member in self.losses)

    @property
    def needs_samples(self) -> bool:
        return any(member.needs_samples for member in self.losses)

    @property
    def needs_groups(self) -> bool:
        return any(member.needs_groups for member in self.losses)

    @property
    def needs_reference_tokens(self) -> bool:
        return any(member.needs_reference_tokens for member in self.losses)

    @property
    def score_thresholds(self) -> tuple[str, ...]:
        return tuple(option for member in self.losses for option in member.score_thresholds)

    @property
    def score_options(self) -> tuple[str, ...]:
        return tuple(option for member in self.losses for option in member.score_options)

    @property
    def tail_weight(self) -> float:
        return self.losses[0].tail_weight

    @property
    def ln2_at_start(self) -> bool:
        return False


LossBlock = Objective | MixLossBlock
LossUnion = Annotated[LossBlock, Field(discriminator="loss_type")]
