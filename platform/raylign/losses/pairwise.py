"""Pairwise losses: tensors [G] in, losses [G] out.

w is the chosen and l the rejected candidate, h a log-ratio log pi - log pi_ref, r = beta h an implicit reward and
delta = beta (s(w) - s(l)), with s = h unless another f-divergence is named.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from raylign.config.losses.pairwise import (
    AotLossBlock,
    ApoLossBlock,
    BcoPairLossBlock,
    DifferenceLossBlock,
    DiscopopLossBlock,
    DpopLossBlock,
    ExoPairLossBlock,
    HingeLossBlock,
    IpoLossBlock,
    LabelledLossBlock,
    NcaPairLossBlock,
    OdpoLossBlock,
    PairwiseLossBlock,
    ProbitLossBlock,
    RdpoLossBlock,
    RobustLossBlock,
    SigmoidLossBlock,
    SigmoidNormLossBlock,
    SppoHardLossBlock,
)
from raylign.losses.inputs import LossInput, LossState, difference, ends, list_mean, loss_of, table
from raylign.losses.stable import bounded_exp, bounded_expm1

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def divergence_scores(logratios: Tensor, divergence: FDivergence, alpha: float) -> Tensor:
    """f-DPO, Wang et al. 2023 (arXiv 2309.16240): s = f'(u) without constants that cancel, u = pi / pi_ref.

    f' is log u, 1 - 1/u, log(2u / (1 + u)) and (u^(alpha-1) - 1) / (alpha - 1).
    """
    match divergence:
        case "reverse_kl":
            return logratios
        case "forward_kl":
            return -bounded_expm1(-logratios)
        case "js_divergence":
            return math.log(2) + logsigmoid(logratios)
        case "alpha_divergence":
            power = alpha - 1.0
            return logratios if abs(power) < 1e-6 else bounded_expm1(power * logratios) / power


def sigmoid(delta: Tensor, label: Tensor | float = 1.0) -> Tensor:
    """DPO, Rafailov et al. 2023 (arXiv 2305.18290) eq. 7, with label probability p as in conservative DPO:

    -p log sigmoid(delta) - (1 - p) log sigmoid(-delta)
    """
    return -label * logsigmoid(delta) - (1 - label) * logsigmoid(-delta)


def bradley_terry_label(score_gap: Tensor, scale: float) -> Tensor:
    """Probability that the chosen candidate wins under Bradley-Terry: sigmoid(scale * score gap)."""
    return torch.sigmoid(scale * score_gap)


def probit(delta: Tensor, label: Tensor | float = 1.0) -> Tensor:
    """Thurstone 1927 / Mosteller 1951 in place of Bradley-Terry: -p log Phi(delta) - (1 - p) log Phi(-delta)."""
    # torch's fp32 gradient of log_ndtr is wrong by a factor of 6 at -1e4; fp64's is right to eight digits.
    wide = delta.double()
    losses: Tensor = -label * torch.special.log_ndtr(wide) - (1 - label) * torch.special.log_ndtr(-wide)
    return losses.to(delta.dtype)


def robust(delta: Tensor, eps: float) -> Tensor:
    """Robust DPO, Chowdhury et al. 2024 (arXiv 2403.00409), unbiased under labels flipped with probability eps:

    -[(1 - eps) log sigmoid(delta) - eps log sigmoid(-delta)] / (1 - 2 eps)
    """
    return -((1 - eps) * logsigmoid(delta) - eps * logsigmoid(-delta)) / (1 - 2 * eps)


def hinge(delta: Tensor) -> Tensor:
    """SLiC-HF (arXiv 2305.10425) on log-ratios as in RSO (arXiv 2309.06657): max(0, 1 - delta)."""
    return torch.relu(1 - delta)


def ipo(difference_per_token: Tensor, beta: float) -> Tensor:
    """IPO, Azar et al. 2023 (arXiv 2310.12036) eq. 17: (s(w)/|w| - s(l)/|l| - 1/(2 beta))^2."""
    return (difference_per_token - 1 / (2 * beta)) ** 2


def exo_pair(delta: Tensor, eps: float) -> Tensor:
    """EXO, Ji et al. 2024 (arXiv 2402.00856) eq. 16: KL of (sigmoid(delta), sigmoid(-delta)) from (1 - eps, eps)."""
    chosen = torch.sigmoid(delta) * (logsigmoid(delta) - math.log1p(-eps))
    rejected = torch.sigmoid(-delta) * (logsigmoid(-delta) - math.log(eps))
    return chosen + rejected


def discopop(delta: Tensor, tau: float) -> Tensor:
    """DiscoPOP, Lu et al. 2024 (arXiv 2406.08414) eq. 5, m = sigmoid(delta / tau):

    (1 - m) log(1 + e^-delta) + m e^-delta
    """
    logistic = -torch.sigmoid(-delta / tau) * logsigmoid(delta)
    return logistic + bounded_exp(logsigmoid(delta / tau) - delta)


def nca_pair(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """NCA, Chen et al. 2024 (arXiv 2402.05369): -log sigmoid(r(w)) - [log sigmoid(-r(w)) + log sigmoid(-r(l))] / 2."""
    return -logsigmoid(chosen_rewards) - (logsigmoid(-chosen_rewards) + logsigmoid(-rejected_rewards)) / 2


def bco_pair(chosen_rewards: Tensor, rejected_rewards: Tensor, shift: float) -> Tensor:
    """BCO, Jung et al. 2024 (arXiv 2404.04656): -log sigmoid(r(w) - shift) - log sigmoid(-(r(l) - shift))."""
    return -logsigmoid(chosen_rewards - shift) - logsigmoid(shift - rejected_rewards)


def sppo_hard(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """SPPO, Wu et al. 2024 (arXiv 2405.00675) eq. 4.7, hard labels: (h(w) - 1/(2 beta))^2 + (h(l) + 1/(2 beta))^2."""
    return (chosen_logratios - 0.5 / beta) ** 2 + (rejected_logratios + 0.5 / beta) ** 2


def apo_zero(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """APO-zero, D'Oosterlinck et al. 2024 (arXiv 2408.06266) eq. 7: 1 - sigmoid(r(w)) + sigmoid(r(l))."""
    return torch.sigmoid(-chosen_rewards) + torch.sigmoid(rejected_rewards)


def apo_down(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """APO-down, the same paper's eq. 8: sigmoid(r(w)) + 1 - sigmoid(r(w) - r(l))."""
    return torch.sigmoid(chosen_rewards) + torch.sigmoid(rejected_rewards - chosen_rewards)


def aot(better: Tensor, worse: Tensor, beta: float, eps: float) -> Tensor:
    """AOT, Melnyk et al. 2024 (arXiv 2406.05882): sigmoid's loss on beta (better_(k) - worse_(k)), the k-th smallest.

    Row g holds the term of the rank k that better[g] has.
    """
    ranks = better.argsort(stable=True).argsort()
    return sigmoid(beta * (better - worse.sort(stable=True).values[ranks]), 1 - eps)


def odpo(delta: Tensor, score_gap: Tensor, alpha: float, offset: Literal["log", "linear"]) -> Tensor:
    """ODPO, Amini et al. 2024 (arXiv 2402.10571): -log sigmoid(delta - alpha g(score gap)), g = log or the identity."""
    # A pair has a positive gap; the floor keeps a tie finite.
    gap = score_gap.clamp_min(1e-6).log() if offset == "log" else score_gap
    return sigmoid(delta - alpha * gap)


def dpop(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, penalty: float) -> Tensor:
    """DPO-Positive, Pal et al. 2024 (arXiv 2402.13228): -log sigmoid(beta (h(w) - h(l) - penalty max(0, -h(w))))."""
    drop = torch.relu(-chosen_logratios)
    return sigmoid(beta * (chosen_logratios - rejected_logratios - penalty * drop))


def rdpo(delta: Tensor, length_gap: Tensor, alpha: float) -> Tensor:
    """R-DPO, Park et al. 2024 (arXiv 2403.19159): -log sigmoid(delta + alpha (|w| - |l|))."""
    return sigmoid(delta + alpha * length_gap)


def _scores(logps: LossInput, block: DifferenceLossBlock) -> Tensor:
    """[G, K]: s."""
    return divergence_scores(logps.policy - logps.reference, block.f_divergence_type, block.f_alpha_divergence_coef)


def _delta(logps: LossInput, block: DifferenceLossBlock) -> Tensor:
    return block.beta * difference(_scores(logps, block), logps.mask)


def _delta_per_token(logps: LossInput, block: DifferenceLossBlock) -> Tensor:
    """s(w) / |w| - s(l) / |l|."""
    return difference(_scores(logps, block) / logps.lengths, logps.mask)


def _label(logps: LossInput, block: LabelledLossBlock) -> Tensor | float:
    if block.soft_label_scale is None:
        return 1 - block.label_smoothing
    return bradley_terry_label(difference(logps.scores, logps.mask), block.soft_label_scale)


def _logratios(logps: LossInput) -> tuple[Tensor, Tensor]:
    """h(w), h(l)."""
    return ends(logps.policy - logps.reference, logps.mask)


def _rewards(logps: LossInput, block: PairwiseLossBlock) -> tuple[Tensor, Tensor]:
    """r(w), r(l)."""
    chosen, rejected = _logratios(logps)
    return block.beta * chosen, block.beta * rejected


def _plain_delta(logps: LossInput, block: PairwiseLossBlock) -> Tensor:
    """beta (h(w) - h(l))."""
    chosen, rejected = _logratios(logps)
    return block.beta * (chosen - rejected)


def _apo(logps: LossInput, block: ApoLossBlock, state: LossState) -> Tensor:
    return (apo_zero if block.loss_type == "apo_zero" else apo_down)(*_rewards(logps, block))


def _aot(logps: LossInput, block: AotLossBlock, state: LossState) -> Tensor:
    if block.loss_type == "aot_unpaired":
        return aot(*_logratios(logps), block.beta, block.label_smoothing)
    policy, reference = difference(logps.policy, logps.mask), difference(logps.reference, logps.mask)
    return aot(policy, reference, block.beta, block.label_smoothing)


def _reward_shift(logps: LossInput, block: BcoPairLossBlock, state: LossState) -> dict[str, Tensor]:
    return {"reward_shift": block.beta * list_mean(logps.policy - logps.reference, logps.mask)}


LOSSES = table(
    loss_of(SigmoidLossBlock, lambda c, b, state: sigmoid(_delta(c, b), _label(c, b))),
    loss_of(SigmoidNormLossBlock, lambda c, b, state: sigmoid(b.beta * _delta_per_token(c, b), _label(c, b))),
    loss_of(ProbitLossBlock, lambda c, b, state: probit(_delta(c, b), _label(c, b))),
    loss_of(RobustLossBlock, lambda c, b, state: robust(_delta(c, b), b.label_smoothing)),
    loss_of(HingeLossBlock, lambda c, b, state: hinge(_delta(c, b))),
    loss_of(IpoLossBlock, lambda c, b, state: ipo(_delta_per_token(c, b), b.beta)),
    loss_of(ExoPairLossBlock, lambda c, b, state: exo_pair(_delta(c, b), b.label_smoothing)),
    loss_of(DiscopopLossBlock, lambda c, b, state: discopop(_delta(c, b), b.discopop_tau)),
    loss_of(NcaPairLossBlock, lambda c, b, state: nca_pair(*_rewards(c, b))),
    loss_of(
        BcoPairLossBlock,
        lambda c, b, state: bco_pair(*_rewards(c, b), state.reward_shift),
        metrics=_reward_shift,
    ),
    loss_of(SppoHardLossBlock, lambda c, b, state: sppo_hard(*_logratios(c), b.beta)),
    loss_of(ApoLossBlock, _apo),
    loss_of(AotLossBlock, _aot),
    loss_of(
        OdpoLossBlock,
        lambda c, b, state: odpo(_plain_delta(c, b), difference(c.scores, c.mask), b.odpo_alpha, b.odpo_offset),
    ),
    loss_of(DpopLossBlock, lambda c, b, state: dpop(*_logratios(c), b.beta, b.dpop_lambda)),
    loss_of(
        RdpoLossBlock,
        lambda c, b, state: rdpo(_plain_delta(c, b), difference(c.lengths, c.mask), b.rdpo_alpha),
    ),
)
"""In each entry c are the candidates and b the block."""
