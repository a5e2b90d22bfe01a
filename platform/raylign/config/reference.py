"""The policy that log-ratios and KL are measured against."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from raylign.config.base import Block
from raylign.config.losses import LossBlock


class InitialReferenceBlock(Block):
    """The model before round 1: the policy without its adapter, or a frozen copy."""

    policy: Literal["initial"] = "initial"


class PreviousRoundReferenceBlock(Block):
    """The policy as it was when the round began: iterative DPO (Xu et al. 2023, arXiv 2312.16682)."""

    policy: Literal["previous_round"] = "previous_round"


class EveryReferenceBlock(Block):
    """A hard update after every n-th round: TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656, eq. 4)."""

    policy: Literal["every"] = "every"
    n: PositiveInt = 2
    """Rounds between updates."""


class EmaReferenceBlock(Block):
    """A soft update after every round, ref <- alpha policy + (1 - alpha) ref: TR-DPO (arXiv 2404.09656, eq. 3).

    Of an adapter the two factors are mixed, each by itself.
    """

    policy: Literal["ema"] = "ema"
    alpha: float = Field(0.6, gt=0.0, lt=1.0)
    """Share of the policy; TRL's `ref_model_mixup_alpha`."""


class SamplerReferenceBlock(Block):
    """The sampling policy, by the log-probs it sampled with: no extra forward pass.

    Those are the generator's own, so that the first loss is off ln 2 by what vLLM and the trainer differ.
    """

    policy: Literal["sampler"] = "sampler"


class ModelReferenceBlock(Block):
    """Another checkpoint with the policy's vocabulary, say a stronger SFT model; it never moves.

    It is kept as the policy's base is: in `model.dtype`, and in 4 bits with `model.load_in_4bit`.
    """

    policy: Literal["model"] = "model"
    path: str
    """`embedded:...`, a local folder in transformers format, or a hub id."""
    revision: str | None = None
    """Hub revision; pin it for repeatable runs."""


class NoReferenceBlock(Block):
    """No reference, for losses that do not read one."""

    policy: Literal["none"] = "none"


ReferenceBlock = (
    InitialReferenceBlock
    | PreviousRoundReferenceBlock
    | EveryReferenceBlock
    | EmaReferenceBlock
    | SamplerReferenceBlock
    | ModelReferenceBlock
    | NoReferenceBlock
)
ReferenceUnion = Annotated[ReferenceBlock, Field(discriminator="policy")]


def require_reference(loss: LossBlock, reference: ReferenceBlock) -> None:
    """Raise ValueError when `loss` reads log-probs of a reference and there is none."""
    if loss.needs_reference and isinstance(reference, NoReferenceBlock):
        raise ValueError(
            f"loss.loss_type={loss.loss_type} reads reference log-probs; "
            "set reference.policy=initial, or take a loss without reference such as simpo"
        )
