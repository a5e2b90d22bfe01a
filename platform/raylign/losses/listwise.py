"""Losses of whole lists: rewards [G, K] in, losses [G] out; and KTO, which takes each candidate by itself.

`beats` [G, K, K] is True where candidate i has a higher score than candidate j, both real: candidates of equal scores
are never compared. r is an implicit reward.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from raylign.config.losses.listwise import (
    AllPairsLossBlock,
    KtoLossBlock,
    LambdaLossBlock,
    ListMleLossBlock,
    ListNetLossBlock,
    PlackettLuceLossBlock,
)
from raylign.losses.inputs import LossInput, LossState, implicit_rewards, list_mean, loss_of, table


def beaten(scores: Tensor, mask: Tensor) -> Tensor:
    """`beats` from scores [G, K] and the mask of real candidates."""
    real = mask[:, :, None] & mask[:, None, :]
    return real & (scores[:, :, None] > scores[:, None, :])


def gaps(values: Tensor) -> Tensor:
    """[G, K] -> [G, K, K]: value of i less value of j."""
    return values[:, :, None] - values[:, None, :]


def choice_losses(rewards: Tensor, beats: Tensor) -> Tensor:
    """[G, K]: -log of the probability that i is chosen among itself and those it beats, e^r(i) / sum_j e^r(j)."""
    own = torch.eye(rewards.shape[1], dtype=torch.bool, device=rewards.device)
    return (-gaps(rewards)).masked_fill(~(beats | own), -torch.inf).logsumexp(2)


def plackett_luce(rewards: Tensor, beats: Tensor) -> Tensor:
    """DPO for rankings, Rafailov et al. 2023 (arXiv 2305.18290) app. A.3:

    -sum_k log [e^r(k) / sum_{j >= k} e^r(j)], with those tied with k left out of its sum
    """
    return choice_losses(rewards, beats).sum(1)


def list_mle(rewards: Tensor, beats: Tensor, position_aware: bool) -> Tensor:
    """ListMLE, Xia et al. 2008: plackett_luce's sum, for length-normalised rewards.

    p-ListMLE, Lan et al. 2014, weighs the k-th of n terms by 2^(n-k) - 1, here scaled to a mean of 1.
    """
    losses = choice_losses(rewards, beats)
    if not position_aware:
        return losses.sum(1)
    # Ties share the first of their places. Dividing all weights by 2^n keeps them finite for any n.
    better = beats.sum(1)
    last = better.amax(1, keepdim=True)
    weights = (torch.exp2(-better.to(rewards.dtype)) - torch.exp2(-last.to(rewards.dtype))) * beats.any(2)
    scale = beats.any(2).sum(1) / weights.sum(1).clamp_min(torch.finfo(rewards.dtype).tiny)
    return (weights * losses).sum(1) * scale


def list_net(rewards: Tensor, scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """ListNet, Cao et al. 2007 (top-one): -sum_k softmax(score / temperature)_k log softmax(r)_k."""
    lowest = torch.finfo(rewards.dtype).min
    target = (scores / temperature).masked_fill(~mask, lowest).softmax(1)
    logps = rewards.masked_fill(~mask, lowest).log_softmax(1)
    return -(target * logps.masked_fill(~mask, 0.0)).sum(1)


def lambda_weights(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """[G, K, K] |G_i - G_j| |1/D_i - 1/D_j|, G = 2^g - 1, D = log2(1 + place under the rewards), detached.

    g: scores scaled to [0, 1] within the group. Candidates of equal rewards are placed in list order.
    """
    low = scores.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    gains = torch.exp2(
        ((scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)).masked_fill(~mask, 0.0)
    )
    order = rewards.detach().masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    discounts = 1 / torch.log2(2.0 + order.argsort(dim=1))
    return gaps(gains).abs() * gaps(discounts).abs()


def lambda_loss(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """LiPO-lambda, (arXiv 2402.01878): sum over score_i > score_j of weight_ij log(1 + e^(r_j - r_i))."""
    weights = lambda_weights(rewards, scores, mask) * beaten(scores, mask)
    return -(weights * logsigmoid(gaps(rewards))).sum((1, 2))


def all_pairs_logistic(rewards: Tensor, beats: Tensor) -> Tensor:
    """LiPO's pair-logistic: mean over score_i > score_j of log(1 + e^(r_j - r_i))."""
    return _pair_mean(-logsigmoid(gaps(rewards)), beats)


def all_pairs_hinge(rewards: Tensor, beats: Tensor) -> Tensor:
    """LiPO's pair-hinge: mean over score_i > score_j of max(0, 1 - (r_i - r_j))."""
    return _pair_mean(torch.relu(1 - gaps(rewards)), beats)


def _pair_mean(losses: Tensor, beats: Tensor) -> Tensor:
    return (losses * beats).sum((1, 2)) / beats.sum((1, 2)).clamp_min(1)


def kto(
    policy: Tensor,
    reference: Tensor,
    is_desirable: Tensor,
    kl: float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, Ethayarajh et al. 2024 (arXiv 2402.01306), elementwise: lambda_y - v(x, y) with

    v = lambda_D sigmoid(beta (h - kl)) for desirable and lambda_U sigmoid(beta (kl - h)) for undesirable completions.
    `kl` >= 0 estimates KL(pi || pi_ref), on other completions than these, and takes no gradient.
    """
    gain = beta * (policy - reference - kl)
    desirable, undesirable = torch.sigmoid(-gain), torch.sigmoid(gain)
    return torch.where(is_desirable, desirable_weight * desirable, undesirable_weight * undesirable)


def _beats(logps: LossInput) -> Tensor:
    return beaten(logps.scores, logps.mask)


def _list_mle(logps: LossInput, block: ListMleLossBlock, state: LossState) -> Tensor:
    return list_mle(implicit_rewards(logps, block) / logps.lengths, _beats(logps), block.position_aware)


def _all_pairs(logps: LossInput, block: AllPairsLossBlock, state: LossState) -> Tensor:
    loss = all_pairs_logistic if block.loss_type == "all_pairs_logistic" else all_pairs_hinge
    return loss(implicit_rewards(logps, block), _beats(logps))


def _kto(logps: LossInput, block: KtoLossBlock, state: LossState) -> Tensor:
    bar = list_mean(logps.scores, logps.mask)[:, None] if block.desirable_above is None else block.desirable_above
    losses = kto(
        logps.policy,
        logps.reference,
        logps.scores > bar,
        state.kl,
        beta=block.beta,
        desirable_weight=block.desirable_weight,
        undesirable_weight=block.undesirable_weight,
    )
    return list_mean(losses, logps.mask)


LOSSES = table(
    loss_of(
        KtoLossBlock,
        _kto,
        metrics=lambda c, b, state: {"kl": torch.full_like(c.kl_logratios, state.kl)},
    ),
    loss_of(PlackettLuceLossBlock, lambda c, b, state: plackett_luce(implicit_rewards(c, b), _beats(c))),
    loss_of(ListMleLossBlock, _list_mle),
    loss_of(
        ListNetLossBlock,
        lambda c, b, state: list_net(implicit_rewards(c, b), c.scores, c.mask, b.score_temperature),
    ),
    loss_of(LambdaLossBlock, lambda c, b, state: lambda_loss(implicit_rewards(c, b), c.scores, c.mask)),
    loss_of(AllPairsLossBlock, _all_pairs),
)
"""In each entry c are the candidates and b the block."""
