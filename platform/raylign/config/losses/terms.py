"""Terms that stand beside an objective in a mix."""

from typing import ClassVar, Literal

from raylign.config.losses.base import LossBase


class TermBlock(LossBase):
    """A term for a mix; its coefficient is its entry in `loss_weights`, whatever the beta beside it."""

    pairs_only: ClassVar[bool] = False


class SftLossBlock(TermBlock):
    """Negative log-likelihood of the best candidate, per token: -sum log pi(w) / sum |w|, both over the step."""

    loss_type: Literal["sft"] = "sft"
    needs_reference: ClassVar[bool] = False


class KlLossBlock(TermBlock):
    """Penalty on KL(pi || pi_ref): h(y)^2 / 2 (Schulman's k2), on samples of the policy whatever their scores.

    Each preference carries one, to some prompt of the round. On samples of the policy at `sampling.temperature` 1,
    without `top_p` and `top_k`, its gradient is that of the reverse KL in expectation.
    """

    loss_type: Literal["kl"] = "kl"
    needs_kl_gradient: ClassVar[bool] = True


class EntropyLossBlock(TermBlock):
    """Entropy bonus: minus the mean token entropy, mean over the candidates."""

    loss_type: Literal["entropy"] = "entropy"
    needs_reference: ClassVar[bool] = False
    needs_entropy_gradient: ClassVar[bool] = True


class XpoLossBlock(TermBlock):
    """XPO's exploration bonus (arXiv 2405.21046 alg. 1): log pi(y~), y~ a sample of the reference, mean over those.

    Its weight is TRL's `alpha`, say 1e-5: what the reference says anyhow gets less likely. 0 in a group without any.
    """

    loss_type: Literal["xpo"] = "xpo"
    needs_reference: ClassVar[bool] = False
    needs_reference_samples: ClassVar[bool] = True


Term = SftLossBlock | KlLossBlock | EntropyLossBlock | XpoLossBlock
"""Every term."""
