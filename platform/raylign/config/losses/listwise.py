"""Losses of a whole list of candidates, and KTO, which takes each by itself."""

from typing import ClassVar, Literal

from pydantic import PositiveFloat

from raylign.config.losses.base import LossBase


class ListLossBlock(LossBase):
    """A loss of the whole list that reads the reference; candidates of equal scores are never compared."""

    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference."""
    pairs_only: ClassVar[bool] = False


class KtoLossBlock(ListLossBlock):
    """KTO (arXiv 2402.01306): weight (1 - sigmoid(+-beta (h(y) - KL))), + for desirable and - for undesirable y.

    A group's loss is the mean over its candidates. The KL is that of the policy as the step finds it: the mean
    log-ratio, not below 0, of completions that are not chosen by their score, one for each preference of the step (all
    micro-batches and ranks), without gradients. On a data set that is, as in TRL, an answer of another row after the
    row's own prompt; online a sample of the policy to one of the round's prompts.
    """

    loss_type: Literal["kto"] = "kto"
    needs_kl_baseline: ClassVar[bool] = True
    desirable_weight: PositiveFloat = 1.0
    """Weight of desirable candidates."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of undesirable candidates."""
    desirable_above: float | None = None
    """Candidates with a score above this are desirable; null takes the mean score of each group."""

    @property
    def score_thresholds(self) -> tuple[str, ...]:
        return () if self.desirable_above is None else (f"desirable_above={self.desirable_above:g}",)


class PlackettLuceLossBlock(ListLossBlock):
    """DPO for rankings (arXiv 2305.18290 app. A.3): -sum_k log [e^r(y_k) / sum_{j >= k} e^r(y_j)]; K = 2 is DPO.

    A candidate competes with itself and with those of lower scores, so ties leave each other alone.
    """

    loss_type: Literal["plackett_luce"] = "plackett_luce"


class ListMleLossBlock(ListLossBlock):
    """ListMLE (Xia et al. 2008; LiPO, arXiv 2402.01878) on length-normalised scores beta h(y) / |y|.

    On unnormalised scores LiPO's ListMLE is `plackett_luce`.
    """

    loss_type: Literal["list_mle"] = "list_mle"
    beta: PositiveFloat = 5.0
    """Strength of the pull towards the reference, per token."""
    position_aware: bool = False
    """p-ListMLE (Lan et al. 2014): weigh the k-th of n places by 2^(n-k) - 1, scaled to a mean of 1."""


class ListNetLossBlock(ListLossBlock):
    """ListNet (Cao et al. 2007), LiPO's softmax: -sum_k softmax(score / score_temperature)_k log softmax(r)_k."""

    loss_type: Literal["list_net"] = "list_net"
    score_temperature: PositiveFloat = 1.0
    """Softness of the target, in units of score."""

    @property
    def score_options(self) -> tuple[str, ...]:
        return ("loss_type=list_net",)


class LambdaLossBlock(ListLossBlock):
    """LiPO-lambda (arXiv 2402.01878): sum over score_i > score_j of Delta_ij log(1 + e^(r_j - r_i)).

    Delta_ij = |2^g_i - 2^g_j| |1/log2(1 + t_i) - 1/log2(1 + t_j)|: t is the place under the policy's rewards (ties in
    list order), g the group's scores scaled to [0, 1], so that scorers of any range can be used.
    """

    loss_type: Literal["lambda"] = "lambda"


class AllPairsLossBlock(ListLossBlock):
    """LiPO's pair losses (arXiv 2402.01878), mean over all pairs with score_i > score_j; K = 2 is `sigmoid` or `hinge`.

    all_pairs_logistic: log(1 + e^(r_j - r_i)); all_pairs_hinge: max(0, 1 - (r_i - r_j)).
    """

    loss_type: Literal["all_pairs_logistic", "all_pairs_hinge"] = "all_pairs_logistic"

    @property
    def ln2_at_start(self) -> bool:
        return self.loss_type == "all_pairs_logistic"


ListLoss = (
    KtoLossBlock | PlackettLuceLossBlock | ListMleLossBlock | ListNetLossBlock | LambdaLossBlock | AllPairsLossBlock
)
"""Every loss of this family."""
