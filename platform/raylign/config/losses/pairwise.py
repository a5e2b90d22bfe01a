"""Losses of a chosen and a rejected candidate, measured against the reference."""

from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from raylign.config.losses.base import Fraction, LossBase, Smoothing


class PairwiseLossBlock(LossBase):
    """A loss of (chosen, rejected) that reads the reference."""

    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference."""
    ld_alpha: Fraction | None = None
    """LD-DPO (arXiv 2409.06411): weight of tokens beyond the shorter completion; null or 1 weighs all alike."""

    @property
    def tail_weight(self) -> float:
        return 1.0 if self.ld_alpha is None else self.ld_alpha


class WeightedLossBlock(PairwiseLossBlock):
    """A pairwise loss that WPO can weigh."""

    use_weighting: bool = False
    """WPO (arXiv 2406.11827): weigh each pair by how likely its completions are under the policy, at most 1."""

    @property
    def ln2_at_start(self) -> bool:
        return self.starts_at_ln2 and not self.use_weighting


class DifferenceLossBlock(WeightedLossBlock):
    """A loss of delta = beta (s(w) - s(l)), s = f'(pi / pi_ref): f-DPO (arXiv 2309.16240) generalises it."""

    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence from the reference; reverse_kl is DPO's and gives s = h."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence; 1 is reverse_kl. Unused by the others."""


class LabelledLossBlock(DifferenceLossBlock):
    """A likelihood of the label "w beats l", with label probability p: 1, smoothed, or soft."""

    label_smoothing: Smoothing = 0.0
    """Probability that a label is flipped: p = 1 - label_smoothing (conservative DPO)."""
    soft_label_scale: PositiveFloat | None = None
    """Take p = sigmoid(soft_label_scale (score(w) - score(l))), Bradley-Terry's probability; null trusts the order."""

    @property
    def score_options(self) -> tuple[str, ...]:
        return () if self.soft_label_scale is None else (f"soft_label_scale={self.soft_label_scale:g}",)

    @model_validator(mode="after")
    def one_source_of_label_noise(self) -> Self:
        if self.label_smoothing and self.soft_label_scale is not None:
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g} and soft_label_scale={self.soft_label_scale:g} both set the "
                "label's probability; leave one of them out"
            )
        return self


class SigmoidLossBlock(LabelledLossBlock):
    """DPO (arXiv 2305.18290 eq. 7): -log sigmoid(delta).

    With label probability p: -p log sigmoid(delta) - (1-p) log sigmoid(-delta).
    """

    loss_type: Literal["sigmoid"] = "sigmoid"
    starts_at_ln2: ClassVar[bool] = True


class SigmoidNormLossBlock(LabelledLossBlock):
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124): sigmoid's loss with s(y) / |y| in place of s(y)."""

    loss_type: Literal["sigmoid_norm"] = "sigmoid_norm"
    starts_at_ln2: ClassVar[bool] = True
    beta: PositiveFloat = 5.0
    """Strength of the pull towards the reference, per token: far above sigmoid's."""


class ProbitLossBlock(LabelledLossBlock):
    """Thurstone-Mosteller in place of Bradley-Terry: -log Phi(delta), Phi the normal distribution function."""

    loss_type: Literal["probit"] = "probit"
    starts_at_ln2: ClassVar[bool] = True


class RobustLossBlock(DifferenceLossBlock):
    """Robust DPO (arXiv 2403.00409): -[(1-eps) log sigmoid(delta) - eps log sigmoid(-delta)] / (1 - 2 eps)."""

    loss_type: Literal["robust"] = "robust"
    starts_at_ln2: ClassVar[bool] = True
    label_smoothing: Smoothing = 0.1
    """eps, the share of flipped labels."""


class HingeLossBlock(DifferenceLossBlock):
    """SLiC-HF / RSO (arXiv 2305.10425, 2309.06657): max(0, 1 - delta)."""

    loss_type: Literal["hinge"] = "hinge"


class IpoLossBlock(DifferenceLossBlock):
    """IPO (arXiv 2310.12036 eq. 17): (s(w)/|w| - s(l)/|l| - 1/(2 beta))^2, per token as TRL does."""

    loss_type: Literal["ipo"] = "ipo"


class ExoPairLossBlock(DifferenceLossBlock):
    """EXO (arXiv 2402.00856 eq. 16): KL((sigmoid(delta), sigmoid(-delta)) || (1-eps, eps))."""

    loss_type: Literal["exo_pair"] = "exo_pair"
    label_smoothing: float = Field(1e-3, gt=0.0, lt=0.5)
    """eps; 0 has no finite loss."""


class DiscopopLossBlock(DifferenceLossBlock):
    """DiscoPOP (arXiv 2406.08414 eq. 5): (1-m) log(1 + e^-delta) + m e^-delta, m = sigmoid(delta / tau)."""

    loss_type: Literal["discopop"] = "discopop"
    discopop_tau: PositiveFloat = 0.05
    """Temperature of the blend."""


class NcaPairLossBlock(WeightedLossBlock):
    """NCA (arXiv 2402.05369): -log sigmoid(r(w)) - [log sigmoid(-r(w)) + log sigmoid(-r(l))] / 2."""

    loss_type: Literal["nca_pair"] = "nca_pair"


class BcoPairLossBlock(WeightedLossBlock):
    """BCO (arXiv 2404.04656): -log sigmoid(r(w) - shift) - log sigmoid(shift - r(l))."""

    loss_type: Literal["bco_pair"] = "bco_pair"
    reward_shift_decay: Fraction | None = None
    """Keep of the running mean (r(w) + r(l)) / 2 per step, which is the shift; null keeps the shift 0 as TRL does.

    The mean starts anew, from the rewards of the next step's preferences, whenever the reference is another one."""

    @property
    def needs_reward_shift(self) -> bool:
        return self.reward_shift_decay is not None


class SppoHardLossBlock(WeightedLossBlock):
    """SPPO with hard labels (arXiv 2405.00675 eq. 4.7): (h(w) - 1/(2 beta))^2 + (h(l) + 1/(2 beta))^2."""

    loss_type: Literal["sppo_hard"] = "sppo_hard"


class ApoLossBlock(WeightedLossBlock):
    """APO (arXiv 2408.06266 eq. 7-8), for chosen completions that are better or worse than the policy's own.

    apo_zero (better): 1 - sigmoid(r(w)) + sigmoid(r(l)); apo_down (worse): sigmoid(r(w)) + 1 - sigmoid(r(w) - r(l)).
    """

    loss_type: Literal["apo_zero", "apo_down"] = "apo_zero"


class AotLossBlock(PairwiseLossBlock):
    """AOT (arXiv 2406.05882): sigmoid's loss on differences of order statistics over one micro-batch.

    aot: sorted log pi(w) - log pi(l) less the sorted same of the reference; aot_unpaired: sorted h(w) less sorted h(l).
    A micro-batch of one is DPO; larger micro-batches are truer to the method.
    """

    loss_type: Literal["aot", "aot_unpaired"] = "aot"
    starts_at_ln2: ClassVar[bool] = True
    label_smoothing: Smoothing = 0.0
    """Weight of the flipped label."""


class OdpoLossBlock(WeightedLossBlock):
    """ODPO (arXiv 2402.10571): -log sigmoid(delta - odpo_alpha g(score(w) - score(l)))."""

    loss_type: Literal["odpo"] = "odpo"
    odpo_alpha: PositiveFloat = 1.0
    """Scale of the offset."""
    odpo_offset: Literal["log", "linear"] = "log"
    """g: the logarithm of the score gap, or the gap itself."""

    @property
    def score_options(self) -> tuple[str, ...]:
        return ("loss_type=odpo",)


class DpopLossBlock(WeightedLossBlock):
    """DPO-Positive (Smaug, arXiv 2402.13228): -log sigmoid(beta (h(w) - h(l) - dpop_lambda max(0, -h(w))))."""

    loss_type: Literal["dpop"] = "dpop"
    starts_at_ln2: ClassVar[bool] = True
    dpop_lambda: PositiveFloat = 50.0
    """Penalty on chosen completions that become less likely than under the reference."""


class RdpoLossBlock(WeightedLossBlock):
    """R-DPO (arXiv 2403.19159): -log sigmoid(delta + rdpo_alpha (|w| - |l|)); length explains part of a label."""

    loss_type: Literal["rdpo"] = "rdpo"
    rdpo_alpha: PositiveFloat = 0.01
    """Reward taken off per token."""


PairwiseLoss = (
    SigmoidLossBlock
    | SigmoidNormLossBlock
    | ProbitLossBlock
    | RobustLossBlock
    | HingeLossBlock
    | IpoLossBlock
    | ExoPairLossBlock
    | DiscopopLossBlock
    | NcaPairLossBlock
    | BcoPairLossBlock
    | SppoHardLossBlock
    | ApoLossBlock
    | AotLossBlock
    | OdpoLossBlock
    | DpopLossBlock
    | RdpoLossBlock
)
"""Every loss of this family."""
