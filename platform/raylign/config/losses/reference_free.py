"""Losses of a chosen and a rejected candidate that need no reference."""

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat

from raylign.config.losses.base import LossBase, Smoothing


class ReferenceFreeLossBlock(LossBase):
    """A pairwise loss of the policy's own log-probs."""

    needs_reference: ClassVar[bool] = False


class MeanLogpLossBlock(ReferenceFreeLossBlock):
    """A reference-free loss of log pi(y) / |y|."""

    beta: PositiveFloat = 2.0
    """Scale of the mean token log-prob."""
    simpo_gamma: float = Field(1.0, ge=0.0)
    """Target margin, in units of reward."""
    label_smoothing: Smoothing = 0.0
    """Weight of the flipped label."""


class SimpoLossBlock(MeanLogpLossBlock):
    """SimPO (arXiv 2405.14734 eq. 6): -log sigmoid(beta (log pi(w)/|w| - log pi(l)/|l|) - simpo_gamma)."""

    loss_type: Literal["simpo"] = "simpo"


class AlphapoLossBlock(MeanLogpLossBlock):
    """AlphaPO (arXiv 2501.03884): SimPO with (1 - p^-alpha) / alpha in place of log p, p = pi(y)^(1/|y|)."""

    loss_type: Literal["alphapo"] = "alphapo"
    alpha: float = 0.25
    """Shape of the reward; 0 is SimPO."""


class CpoLossBlock(ReferenceFreeLossBlock):
    """CPO (arXiv 2401.08417): -log sigmoid(beta (log pi(w) - log pi(l))) + cpo_alpha NLL(w), NLL per token."""

    loss_type: Literal["cpo"] = "cpo"
    beta: PositiveFloat = 0.1
    """Scale of the log-probs."""
    cpo_alpha: float = Field(1.0, ge=0.0)
    """Weight of the NLL term."""
    label_smoothing: Smoothing = 0.0
    """Weight of the flipped label."""


class OrpoLossBlock(ReferenceFreeLossBlock):
    """ORPO (arXiv 2403.07691 eq. 6-7): NLL(w) - beta log sigmoid(log odds(w) - log odds(l)).

    odds = p / (1 - p), p = pi(y)^(1/|y|).
    """

    loss_type: Literal["orpo"] = "orpo"
    beta: PositiveFloat = 0.1
    """Weight of the odds-ratio term (the paper's lambda)."""


ReferenceFreeLoss = SimpoLossBlock | AlphapoLossBlock | CpoLossBlock | OrpoLossBlock
"""Every loss of this family."""
