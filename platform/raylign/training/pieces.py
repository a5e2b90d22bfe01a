"""Preferences of any size in the memory of one piece: the loss's gradients with respect to the scores come first.

A loss is a function L(s) of the scores s of all completions of a preference, and dL/dw = sum_i dL/ds_i ds_i/dw. A pass
without a graph over all pieces gives s, and so dL/ds; a second one over each piece by itself adds its share of the sum,
which is the gradient of sum_i s_i dL/ds_i with dL/ds held fixed. Nothing is left out, whatever the loss compares.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from raylign.losses import LossOutput, LossState
from raylign.training.batches import Step
from raylign.training.kernels.head import TokenScores
from raylign.training.logprobs import CompletionScores
from raylign.training.preferences import PreferenceBatch
from raylign.training.sequences import TokenBatch

if TYPE_CHECKING:
    from raylign.training.learners import Learner, Totals

Scores = CompletionScores | Tensor
"""Of C completions: what `CompletionLogps` says of them, or the rewards [C] of `CompletionRewards`."""


class Trainee(Protocol):
    """A module in training; every rank makes every call."""

    @property
    def module(self) -> nn.Module:
        """Call it to score."""

    @property
    def training_module(self) -> nn.Module:
        """Call it for a loss that goes to `backward`."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; `last` before a step."""


def of_policy(scores: Scores) -> CompletionScores:
    """Those of a policy."""
    assert isinstance(scores, CompletionScores)
    return scores


def of_rewards(scores: Scores) -> Tensor:
    """Those of a reward model."""
    assert isinstance(scores, Tensor)
    return scores


def score(module: nn.Module, batch: PreferenceBatch) -> Scores:
    """What `module` says of the completions of `batch`, in as many passes as the batch has pieces."""
    if not batch.pieces:
        return _of_pass(module, batch.tokens, batch.token_weights)
    return _without_fillers(_joined(_of_pieces(module, batch)), batch)


def add_gradients(
    trainee: Trainee, learner: "Learner", batch: PreferenceBatch, state: LossState, step: Step, *, last: bool
) -> tuple[LossOutput, "Totals"]:
    """Adds the gradient of the share of `batch` in the mean loss of `step`; `last` of the step's micro-batches or not.

    A batch of pieces is run twice, and takes the memory of its largest piece.
    """
    if not batch.pieces:
        loss, own = learner.measure(score(trainee.training_module, batch), batch, state)
        trainee.backward(_share(loss, batch, step), last=last)
        return loss, own
    # The passes with a graph draw what those without have drawn: dropout leaves out the same.
    with torch.no_grad(), torch.random.fork_rng([batch.mask.device] if batch.mask.is_cuda else []):
        scores = _joined(_of_pieces(trainee.module, batch))
    leaves = tuple(part.detach().requires_grad_() for part in _differentiable(scores))
    loss, own = learner.measure(_without_fillers(_with(scores, leaves), batch), batch, state)
    slopes = torch.autograd.grad(_share(loss, batch, step), leaves, allow_unused=True)
    _backward(trainee, batch, slopes, last=last)
    return loss, own


def _share(loss: LossOutput, batch: PreferenceBatch, step: Step) -> Tensor:
    """Engines average over ranks, so ranks / count makes a preference of weight 1 weigh 1 / count."""
    total = (loss.losses * batch.weights).sum() * len(step.micro_batches) / step.count
    # A loss that is not finite makes every gradient so: all ranks then leave the step out.
    return total * (1 + 0 * loss.losses.detach().sum())


def _backward(trainee: Trainee, batch: PreferenceBatch, slopes: Sequence[Tensor | None], *, last: bool) -> None:
    """Adds the gradient of sum_i s_i slope_i; `slopes` are those of `_differentiable`, None is 0."""
    done = [0] * len(slopes)
    for number, (piece, weights) in enumerate(zip(batch.pieces, _token_weights(batch), strict=True)):
        total, done = _with_slopes(_of_pass(trainee.training_module, piece, weights), slopes, done)
        trainee.backward(total, last=last and number == len(batch.pieces) - 1)
        # Else this graph would live on beside that of the next piece.
        del total


def _with_slopes(scores: Scores, slopes: Sequence[Tensor | None], starts: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The sum over one piece, whose slopes begin at `starts`, and where those of the next one begin."""
    parts = _differentiable(scores)
    ends = [start + len(part) for start, part in zip(starts, parts, strict=True)]
    places = zip(parts, slopes, starts, ends, strict=True)
    shares = [(part * slope[start:end]).sum() for part, slope, start, end in places if slope is not None]
    return torch.stack(shares).sum(), ends


def _of_pieces(module: nn.Module, batch: PreferenceBatch) -> list[Scores]:
    of_each = zip(batch.pieces, _token_weights(batch), strict=True)
    return [_of_pass(module, piece, weights) for piece, weights in of_each]


def _token_weights(batch: PreferenceBatch) -> Sequence[Tensor | None]:
    if batch.token_weights is None:
        return [None] * len(batch.pieces)
    return torch.split(batch.token_weights, [len(piece.labels) for piece in batch.pieces])


def _of_pass(module: nn.Module, tokens: TokenBatch, weights: Tensor | None) -> Scores:
    scores: Scores = module(tokens) if weights is None else module(tokens, weights)
    return scores


def _joined(parts: Sequence[Scores]) -> Scores:
    if isinstance(parts[0], Tensor):
        return torch.cat([of_rewards(part) for part in parts])
    found = [of_policy(part) for part in parts]
    firsts = accumulate((len(part.logps) for part in found), initial=0)
    return CompletionScores(
        torch.cat([part.logps for part in found]),
        TokenScores(*(torch.cat(columns) for columns in zip(*(part.tokens for part in found), strict=True))),
        torch.cat([part.owners + first for part, first in zip(found, firsts, strict=False)]),
    )


def _differentiable(scores: Scores) -> tuple[Tensor, ...]:
    """The parts of `scores` that carry gradients."""
    if isinstance(scores, Tensor):
        return (scores,)
    return scores.logps, scores.tokens.logps, scores.tokens.entropies


def _with(scores: Scores, parts: tuple[Tensor, ...]) -> Scores:
    """`scores` with `parts` in the place of those of `_differentiable`."""
    if isinstance(scores, Tensor):
        return parts[0]
    logps, of_tokens, entropies = parts
    return scores._replace(logps=logps, tokens=scores.tokens._replace(logps=of_tokens, entropies=entropies))


def _without_fillers(scores: Scores, batch: PreferenceBatch) -> Scores:
    """Fillers come last and have no tokens."""
    if isinstance(scores, Tensor):
        return scores[: batch.completions]
    return scores._replace(logps=scores.logps[: batch.completions])
