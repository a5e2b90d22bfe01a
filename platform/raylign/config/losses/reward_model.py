"""Losses that train a reward model. r(y) is the model's reward of candidate y, w the best and l the worst candidate."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from raylign.config.base import Block

Link = Literal["logistic", "probit"]
"""From the gap of two rewards to the probability that the first is better: sigmoid, or the normal Phi."""


class RewardLossBase(Block):
    """What the trainer asks of a reward model's loss."""

    loss_type: str
    center_rewards_coefficient: PositiveFloat | None = None
    """Weight of (2 mean r)^2 over the candidates, which keeps rewards around 0 (arXiv 2312.09244); for a pair TRL's
    (r(w) + r(l))^2. null leaves it out; 0.01 is usual."""
    needs_reference: ClassVar[bool] = False
    needs_kl_baseline: ClassVar[bool] = False
    needs_kl_gradient: ClassVar[bool] = False
    needs_kl_sample: ClassVar[bool] = False
    needs_reward_shift: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = False
    needs_reference_tokens: ClassVar[bool] = False
    pairs_only: ClassVar[bool] = True
    """Whether every preference must hold exactly two candidates; else the whole list is used."""
    link: ClassVar[Link] = "logistic"
    """The probability that the loss learns."""

    @property
    def score_options(self) -> tuple[str, ...]:
        """Its options that read more of scores than their order in a row, so that all must be on one scale."""
        return ()

    @property
    def tail_weight(self) -> float:
        """A reward belongs to the whole completion: no token is weighed."""
        return 1.0


class RewardPairLossBlock(RewardLossBase):
    """A loss of the gap r(w) - r(l), less a margin."""

    margin: Literal["none", "scores"] = "none"
    """`scores`: the gap must exceed margin_scale (score(w) - score(l)), as in Llama 2 (arXiv 2307.09288)."""
    margin_scale: PositiveFloat = 1.0
    """Units of reward per unit of score; of use with margin: scores alone."""

    @property
    def score_options(self) -> tuple[str, ...]:
        return () if self.margin == "none" else (f"margin={self.margin}",)

    @model_validator(mode="after")
    def scale_has_a_margin(self) -> Self:
        if self.margin == "none" and self.margin_scale != 1.0:
            raise ValueError(f"margin_scale={self.margin_scale:g} scales no margin; set margin=scores or leave it out")
        return self


class BradleyTerryRewardLossBlock(RewardPairLossBlock):
    """Bradley-Terry: -log sigmoid(r(w) - r(l) - margin)."""

    loss_type: Literal["bradley_terry"] = "bradley_terry"


class ProbitRewardLossBlock(RewardPairLossBlock):
    """Thurstone-Mosteller: -log Phi(r(w) - r(l) - margin)."""

    loss_type: Literal["probit"] = "probit"
    link: ClassVar[Link] = "probit"


class PlackettLuceRewardLossBlock(RewardLossBase):
    """Plackett-Luce on whole rankings: -sum_k log [e^r(y_k) / sum_{j >= k} e^r(y_j)]; K = 2 is `bradley_terry`.

    A candidate competes with itself and with those of lower scores, so ties leave each other alone.
    """

    loss_type: Literal["plackett_luce"] = "plackett_luce"
    pairs_only: ClassVar[bool] = False


RewardLossBlock = BradleyTerryRewardLossBlock | ProbitRewardLossBlock | PlackettLuceRewardLossBlock
RewardLossUnion = Annotated[RewardLossBlock, Field(discriminator="loss_type")]
