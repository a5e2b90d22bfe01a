"""Group-relative policy optimisation: losses of single tokens, each weighed by its completion's advantage."""

from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from raylign.config.losses.base import LossBase


class GrpoLossBlock(LossBase):
    """GRPO (Shao et al. 2024, arXiv 2402.03300 eq. 3) and its kin, with TRL's options and meanings.

    With the ratio c = pi(y_t) / pi_old(y_t) and the advantage A of the completion, a token loses
    -min(c A, clip(c, 1 - epsilon, 1 + epsilon_high) A); cispo (arXiv 2506.13585 eq. 4) loses
    -min(c, epsilon_high) A log pi(y_t) with no gradient through the ratio. pi_old is the policy as the round found it.
    Over a whole step, whatever its micro-batches and ranks:

    grpo: mean over completions of their token means. dapo (arXiv 2503.14476) and cispo: mean over all tokens.
    bnpo: the same as dapo (TRL takes the tokens of a micro-batch, which would make the loss depend on their size).
    dr_grpo (arXiv 2503.20783): sum over tokens, divided by completions x `sampling.max_new_tokens`.
    """

    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"] = "grpo"
    epsilon: PositiveFloat = Field(0.2, lt=1.0)
    """How far below 1 the ratio counts."""
    epsilon_high: PositiveFloat | None = None
    """How far above 1 it counts, null as far as below; DAPO takes 0.28. For cispo the largest ratio itself, say 5."""
    delta: PositiveFloat | None = None
    """Largest ratio where the advantage is below 0, above 1 + epsilon_high (INTELLECT-2); null leaves it open."""
    beta: NonNegativeFloat = 0.0
    """Weight of KL(pi || pi_ref), Schulman's k3 token by token; 0 reads no reference."""
    use_bias_correction_kl: bool = False
    """Weigh the KL term by the ratio too (DeepSeek-V3.2, arXiv 2512.02556)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """A is the score less the group's mean, over the std of the group, of all scores of the round, or as it is."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """`sequence` is GSPO (Zheng et al. 2025, arXiv 2507.18071): c is the geometric mean of the completion's ratios."""
    vllm_importance_sampling_correction: bool = True
    """Weigh tokens by pi_old / pi_sampler, the generator's own log-probs: what vLLM and the trainer differ."""
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    """Of each token or of the whole completion; beyond the bounds it is cut to them, or counts as 0."""
    vllm_importance_sampling_clip_max: PositiveFloat | None = 3.0
    vllm_importance_sampling_clip_min: PositiveFloat | None = None
    pairs_only: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = True
    needs_groups: ClassVar[bool] = True

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Where the KL term counts."""
        return self.beta > 0

    @property
    def needs_reference_tokens(self) -> bool:  # type: ignore[override]
        """Where the KL term counts."""
        return self.beta > 0

    @property
    def clip_high(self) -> float:
        """`epsilon_high`, or what null stands for."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @model_validator(mode="after")
    def a_sequences_ratio_belongs_to_a_loss_of_sequences(self) -> Self:
        if self.importance_sampling_level == "sequence" and self.loss_type != "grpo":
            raise ValueError(
                f"importance_sampling_level=sequence with loss_type={self.loss_type} would weigh each completion by "
                "its length; set loss_type=grpo, as GSPO does"
            )
        return self

    @model_validator(mode="after")
    def bounds_leave_the_ratio_1(self) -> Self:
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1):
            raise ValueError(
                f"epsilon_high={self.epsilon_high} with loss_type=cispo is the largest ratio, and would cut that of an "
                "unchanged policy, 1; set 1 or more, such as 5"
            )
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(
                f"delta={self.delta:g} is not above 1 + epsilon_high = {1 + self.clip_high:g}, so that the clipping "
                "would never be reached; raise it, or set null"
            )
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if (low is not None and low > 1) or (high is not None and high < 1):
            raise ValueError(
                f"vllm_importance_sampling_clip_min={low} and _max={high} leave out the ratio 1, which a generator "
                "that computes as the trainer does has; put them on both sides of 1"
            )
        if self.vllm_importance_sampling_correction and low is None and high is None:
            raise ValueError(
                "vllm_importance_sampling_clip_min and _max are both null, so that nothing bounds the weights; set "
                "one, or vllm_importance_sampling_correction=false"
            )
        return self


GroupLoss = GrpoLossBlock
"""Every loss of this family."""
