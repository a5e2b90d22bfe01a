"""What every loss block shares."""

from typing import Annotated, ClassVar

from pydantic import Field

from raylign.config.base import Block

Smoothing = Annotated[float, Field(ge=0.0, lt=0.5)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class LossBase(Block):
    """What the trainer asks of a loss before it runs it."""

    loss_type: str
    needs_reference: ClassVar[bool] = True
    """Whether it reads the reference log-probs."""
    pairs_only: ClassVar[bool] = True
    """Whether every group must hold exactly two candidates; else the whole list is used."""
    needs_entropy_gradient: ClassVar[bool] = False
    """Whether `LossInput.entropies` must carry gradients."""
    needs_reference_samples: ClassVar[bool] = False
    """Whether it reads `LossInput.from_reference`."""
    needs_kl_baseline: ClassVar[bool] = False
    """Whether it reads `LossState.kl`: KL(pi || pi_ref) of the step, without gradients."""
    needs_kl_gradient: ClassVar[bool] = False
    """Whether it reads `LossInput.kl_logratios`, with gradients."""
    needs_samples: ClassVar[bool] = False
    """Whether it weighs samples of the policy by their probability: reads `TokenLogps.sampler` and `TokenLogps.old`."""
    needs_groups: ClassVar[bool] = False
    """Whether it compares a candidate with all others of its prompt, so that none may be left out."""
    needs_reference_tokens: ClassVar[bool] = False
    """Whether it reads `TokenLogps.reference`, the reference token by token."""
    starts_at_ln2: ClassVar[bool] = False

    @property
    def needs_kl_sample(self) -> bool:
        """Whether every preference must carry a completion to estimate the KL on."""
        return self.needs_kl_baseline or self.needs_kl_gradient

    @property
    def needs_reward_shift(self) -> bool:
        """Whether it reads `LossState.reward_shift`."""
        return False

    @property
    def tail_weight(self) -> float:
        """Weight of completion tokens beyond the group's shortest completion; see `raylign.losses.ld_weights`."""
        return 1.0

    @property
    def score_thresholds(self) -> tuple[str, ...]:
        """Its options that say what a score must exceed."""
        return ()

    @property
    def score_options(self) -> tuple[str, ...]:
        """Its options that read more of scores than their order in a group, so that all must be on one scale."""
        return self.score_thresholds

    @property
    def ln2_at_start(self) -> bool:
        """Whether a policy equal to its reference loses ln 2 on every group."""
        return self.starts_at_ln2
