"""From a block to its function."""

from collections.abc import Mapping
from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from raylign.config.losses import (
    AllPairsLossBlock,
    AlphapoLossBlock,
    AotLossBlock,
    ApoLossBlock,
    BcoPairLossBlock,
    CpoLossBlock,
    DifferenceLoss,
    DiscopopLossBlock,
    DpopLossBlock,
    EntropyLossBlock,
    ExoPairLossBlock,
    HingeLossBlock,
    IpoLossBlock,
    KlLossBlock,
    KtoLossBlock,
    LambdaLossBlock,
    ListLoss,
    ListMleLossBlock,
    ListNetLossBlock,
    LossBlock,
    Member,
    MixLossBlock,
    NcaPairLossBlock,
    OdpoLossBlock,
    OrpoLossBlock,
    PlackettLuceLossBlock,
    ProbitLossBlock,
    RatioLoss,
    RdpoLossBlock,
    ReferenceFreeLoss,
    RobustLossBlock,
    SftLossBlock,
    SigmoidLossBlock,
    SigmoidNormLossBlock,
    SimpoLossBlock,
    SppoHardLossBlock,
    Term,
    XpoLossBlock,
)
from raylign.config.losses.pairwise import WeightedLossBlock
from raylign.losses import listwise, pairwise, reference_free, terms
from raylign.losses.inputs import CandidateLogps, LossOutput, LossState, ends, list_mean, real_groups
from raylign.losses.weighting import wpo_weights


def preference_loss(logps: CandidateLogps, block: LossBlock, state: LossState) -> LossOutput:
    """The loss that `block` names, per preference."""
    groups, size = logps.policy.shape
    if block.pairs_only and size != 2:
        raise ValueError(
            f"{block.loss_type} compares 2 candidates, not {size}; build pairs, or use a listwise loss_type such as "
            "plackett_luce"
        )
    real = logps.mask.any(1)
    some = real_groups(logps, real)
    losses, metrics = _losses_and_metrics(some, block, state)
    first = block.losses[0] if isinstance(block, MixLossBlock) else block
    chosen, rejected = ends(_rewards(some, first).detach(), some.mask)

    def everywhere(values: Tensor) -> Tensor:
        return values.new_zeros(groups).masked_scatter(real, values)

    return LossOutput(
        everywhere(losses),
        everywhere(chosen),
        everywhere(rejected),
        {name: everywhere(values.detach()) for name, values in metrics.items()},
    )


def next_state(state: LossState, block: LossBlock, means: Mapping[str, float]) -> LossState:
    """The state of the next step, from the means of `LossOutput.metrics` over all preferences of this step."""
    for member in block.losses if isinstance(block, MixLossBlock) else (block,):
        match member:
            case BcoPairLossBlock(reward_shift_decay=float(decay)):
                shift = decay * state.reward_shift + (1 - decay) * means["reward_shift"]
                state = replace(state, reward_shift=shift)
    return state


def under_new_reference(state: LossState, block: LossBlock, means: Mapping[str, float]) -> LossState:
    """The state when the reference has become another one, from the means over the preferences of the next step."""
    return replace(state, reward_shift=means["reward_shift"]) if block.needs_reward_shift else state


def _losses_and_metrics(
    logps: CandidateLogps, block: LossBlock, state: LossState
) -> tuple[Tensor, Mapping[str, Tensor]]:
    if not isinstance(block, MixLossBlock):
        return _losses(logps, block, state), _metrics(logps, block, state)
    parts = {member.loss_type: _losses(logps, member, state) for member in block.losses}
    total = torch.stack([weight * part for weight, part in zip(block.weights, parts.values(), strict=True)]).sum(0)
    metrics = {f"loss/{name}": part for name, part in parts.items()}
    for member in block.losses:
        metrics |= _metrics(logps, member, state)
    return total, metrics


def _losses(logps: CandidateLogps, block: Member, state: LossState) -> Tensor:
    if isinstance(block, DifferenceLoss):
        losses = _difference_loss(logps, block)
    elif isinstance(block, RatioLoss):
        losses = _ratio_loss(logps, block, state)
    elif isinstance(block, ReferenceFreeLoss):
        losses = _reference_free_loss(logps, block, state)
    elif isinstance(block, ListLoss):
        losses = _list_loss(logps, block, state)
    else:
        losses = _term(logps, block, state)
    if isinstance(block, WeightedLossBlock) and block.use_weighting:
        return losses * wpo_weights(logps.certainty, logps.mask)
    return losses


def _difference_loss(logps: CandidateLogps, block: DifferenceLoss) -> Tensor:
    logratios = logps.policy - logps.reference
    scores = pairwise.divergence_scores(logratios, block.f_divergence_type, block.f_alpha_divergence_coef)
    delta = block.beta * _difference(scores, logps.mask)
    delta_per_token = _difference(scores / logps.lengths, logps.mask)
    match block:
        case SigmoidLossBlock():
            return pairwise.sigmoid(delta, _label(logps, block))
        case SigmoidNormLossBlock():
            return pairwise.sigmoid(block.beta * delta_per_token, _label(logps, block))
        case ProbitLossBlock():
            return pairwise.probit(delta, _label(logps, block))
        case RobustLossBlock():
            return pairwise.robust(delta, block.label_smoothing)
        case HingeLossBlock():
            return pairwise.hinge(delta)
        case IpoLossBlock():
            return pairwise.ipo(delta_per_token, block.beta)
        case ExoPairLossBlock():
            return pairwise.exo_pair(delta, block.label_smoothing)
        case DiscopopLossBlock():
            return pairwise.discopop(delta, block.discopop_tau)
        case _:
            assert_never(block)


def _ratio_loss(logps: CandidateLogps, block: RatioLoss, state: LossState) -> Tensor:
    beta = block.beta
    chosen, rejected = ends(logps.policy - logps.reference, logps.mask)
    delta = beta * (chosen - rejected)
    match block:
        case NcaPairLossBlock():
            return pairwise.nca_pair(beta * chosen, beta * rejected)
        case BcoPairLossBlock():
            return pairwise.bco_pair(beta * chosen, beta * rejected, state.reward_shift)
        case SppoHardLossBlock():
            return pairwise.sppo_hard(chosen, rejected, beta)
        case ApoLossBlock(loss_type="apo_zero"):
            return pairwise.apo_zero(beta * chosen, beta * rejected)
        case ApoLossBlock():
            return pairwise.apo_down(beta * chosen, beta * rejected)
        case AotLossBlock(loss_type="aot"):
            policy, reference = _difference(logps.policy, logps.mask), _difference(logps.reference, logps.mask)
            return pairwise.aot(policy, reference, beta, block.label_smoothing)
        case AotLossBlock():
            return pairwise.aot(chosen, rejected, beta, block.label_smoothing)
        case OdpoLossBlock():
            gap = _difference(logps.scores, logps.mask)
            return pairwise.odpo(delta, gap, block.odpo_alpha, block.odpo_offset)
        case DpopLossBlock():
            return pairwise.dpop(chosen, rejected, beta, block.dpop_lambda)
        case RdpoLossBlock():
            return pairwise.rdpo(delta, _difference(logps.lengths, logps.mask), block.rdpo_alpha)
        case _:
            assert_never(block)


def _reference_free_loss(logps: CandidateLogps, block: ReferenceFreeLoss, state: LossState) -> Tensor:
    match block:
        case SimpoLossBlock() | AlphapoLossBlock():
            gap = _difference(_scores_per_token(logps, block), logps.mask)
            return reference_free.simpo(gap, block.beta, block.simpo_gamma, block.label_smoothing)
        case CpoLossBlock():
            gap = _difference(logps.policy, logps.mask)
            return reference_free.cpo(gap, _nll(logps, state), block.beta, block.cpo_alpha, block.label_smoothing)
        case OrpoLossBlock():
            return reference_free.orpo(_log_odds(logps), _nll(logps, state), block.beta)
        case _:
            assert_never(block)


def _list_loss(logps: CandidateLogps, block: ListLoss, state: LossState) -> Tensor:
    scores, mask = logps.scores, logps.mask
    rewards = block.beta * (logps.policy - logps.reference)
    beats = listwise.beaten(scores, mask)
    match block:
        case KtoLossBlock():
            return _kto(logps, block, state)
        case PlackettLuceLossBlock():
            return listwise.plackett_luce(rewards, beats)
        case ListMleLossBlock():
            return listwise.list_mle(rewards / logps.lengths, beats, block.position_aware)
        case ListNetLossBlock():
            return listwise.list_net(rewards, scores, mask, block.score_temperature)
        case LambdaLossBlock():
            return listwise.lambda_loss(rewards, scores, mask)
        case AllPairsLossBlock(loss_type="all_pairs_logistic"):
            return listwise.all_pairs_logistic(rewards, beats)
        case AllPairsLossBlock():
            return listwise.all_pairs_hinge(rewards, beats)
        case _:
            assert_never(block)


def _term(logps: CandidateLogps, block: Term, state: LossState) -> Tensor:
    match block:
        case SftLossBlock():
            return _nll(logps, state)
        case KlLossBlock():
            return terms.kl_penalty(logps.kl_logratios)
        case EntropyLossBlock():
            return -list_mean(logps.entropies, logps.mask)
        case XpoLossBlock():
            return terms.exploration_bonus(logps.policy, logps.from_reference)
        case _:
            assert_never(block)


def _kto(logps: CandidateLogps, block: KtoLossBlock, state: LossState) -> Tensor:
    bar = list_mean(logps.scores, logps.mask)[:, None] if block.desirable_above is None else block.desirable_above
    losses = terms.kto(
        logps.policy,
        logps.reference,
        logps.scores > bar,
        state.kl,
        beta=block.beta,
        desirable_weight=block.desirable_weight,
        undesirable_weight=block.undesirable_weight,
    )
    return list_mean(losses, logps.mask)


def _rewards(logps: CandidateLogps, block: Member) -> Tensor:
    """[G, K]: what TRL logs as this loss's implicit rewards."""
    match block:
        case SimpoLossBlock() | AlphapoLossBlock():
            return block.beta * _scores_per_token(logps, block)
        case CpoLossBlock():
            return block.beta * logps.policy
        case OrpoLossBlock():
            return block.beta * logps.policy / logps.lengths
        case SftLossBlock() | KlLossBlock() | EntropyLossBlock() | XpoLossBlock():
            return logps.policy - logps.reference
        case _:
            return block.beta * (logps.policy - logps.reference)


def _metrics(logps: CandidateLogps, block: Member, state: LossState) -> dict[str, Tensor]:
    """What `block` has to log beside its loss and rewards, [G] each."""
    match block:
        case CpoLossBlock():
            return {"nll_loss": _nll(logps, state)}
        case OrpoLossBlock():
            log_odds = _log_odds(logps)
            return {
                "nll_loss": _nll(logps, state),
                "log_odds_ratio": logsigmoid(log_odds),
                "log_odds_chosen": log_odds,
            }
        case KtoLossBlock():
            return {"kl": torch.full_like(logps.kl_logratios, state.kl)}
        case KlLossBlock():
            return {"kl": logps.kl_logratios}
        case BcoPairLossBlock():
            return {"reward_shift": block.beta * list_mean(logps.policy - logps.reference, logps.mask)}
        case _:
            return {}


def _difference(values: Tensor, mask: Tensor) -> Tensor:
    best, worst = ends(values, mask)
    return best - worst


def _label(logps: CandidateLogps, block: SigmoidLossBlock | SigmoidNormLossBlock | ProbitLossBlock) -> Tensor | float:
    if block.soft_label_scale is None:
        return 1 - block.label_smoothing
    return pairwise.bradley_terry_label(_difference(logps.scores, logps.mask), block.soft_label_scale)


def _scores_per_token(logps: CandidateLogps, block: SimpoLossBlock | AlphapoLossBlock) -> Tensor:
    alpha = block.alpha if isinstance(block, AlphapoLossBlock) else 0.0
    return reference_free.alphapo_scores(logps.policy / logps.lengths, alpha)


def _log_odds(logps: CandidateLogps) -> Tensor:
    return reference_free.log_odds_ratio(*ends(logps.policy / logps.lengths, logps.mask))


def _nll(logps: CandidateLogps, state: LossState) -> Tensor:
    return terms.nll(logps.policy[:, 0], logps.lengths[:, 0], state.mean_chosen_tokens)
