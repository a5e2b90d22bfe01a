"""The terms of a mix, and the likelihood of demonstrations."""

from torch import Tensor

from raylign.config.losses.terms import EntropyLossBlock, KlLossBlock, SftLossBlock, TermBlock, XpoLossBlock
from raylign.losses.inputs import LossInput, list_mean, loss_of, nll, table


def kl_penalty(logratios: Tensor) -> Tensor:
    """Schulman's k2 estimator h^2 / 2 of KL(pi || pi_ref), elementwise.

    Its gradient h grad log pi is, on samples of the policy, unbiased for that of the reverse KL.
    """
    return logratios**2 / 2


def exploration_bonus(policy: Tensor, from_reference: Tensor) -> Tensor:
    """XPO's bonus, Xie et al. 2024 (arXiv 2405.21046) alg. 1: log pi(y~) in nats, y~ a sample of the reference.

    [G, K] log-probs -> [G], the mean over the candidates where `from_reference` [G, K] is True; 0 where none is.
    """
    return (policy * from_reference).sum(1) / from_reference.sum(1).clamp_min(1)


def _logratios(logps: LossInput, block: TermBlock) -> Tensor:
    """A term has no beta."""
    return logps.policy - logps.reference


LOSSES = table(
    loss_of(SftLossBlock, lambda c, b, state: nll(c, state), rewards=_logratios),
    loss_of(
        KlLossBlock,
        lambda c, b, state: kl_penalty(c.kl_logratios),
        rewards=_logratios,
        metrics=lambda c, b, state: {"kl": c.kl_logratios},
    ),
    loss_of(EntropyLossBlock, lambda c, b, state: -list_mean(c.entropies, c.mask), rewards=_logratios),
    loss_of(XpoLossBlock, lambda c, b, state: exploration_bonus(c.policy, c.from_reference), rewards=_logratios),
)
"""In each entry c are the candidates and b the block."""
