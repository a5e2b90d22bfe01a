"""Log-probabilities of given tokens under a linear output head, without a [N, V] tensor of logits."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from raylign.training.kernels.logit_sums import LogitSums


class Tile(NamedTuple):
    """How many tokens' logits, for how many vocabulary entries, exist at a time."""

    tokens: int
    entries: int


_TILES = {"cpu": Tile(512, 4096), "cuda": Tile(2048, 8192)}
"""On CPUs about what the caches hold: every pass over logits in main memory takes several times as long."""


class TokenScores(NamedTuple):
    """What the head says of N tokens; all are fp32 [N].

    `logps` (nats) and `entropies` (nats) carry gradients. Detached: `correct` is 1 where no token is likelier than the
    label, `mean_logits` averages over the vocabulary, `log_collisions` is log sum_v p(v)^2.
    """

    logps: Tensor
    entropies: Tensor
    correct: Tensor
    mean_logits: Tensor
    log_collisions: Tensor


def linear_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> TokenScores:
    """Scores of `labels` [N] for logits = hidden [N, H] @ weight [V, H]^T + bias [V]; log-sum-exp is fp32.

    Tiles of the logits bound the memory, whatever N and V; the backward pass computes them again.
    """
    return TokenScores(*_LinearScores.apply(hidden, weight, bias, labels))  # type: ignore[no-untyped-call]


class _LinearScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        sums = LogitSums.none(hidden.shape[0], hidden.device)
        tile = _TILES[hidden.device.type]
        for columns in _spans(weight.shape[0], tile.entries):
            for rows in _spans(hidden.shape[0], tile.tokens):
                sums.add(rows, _logits(hidden[rows], weight, bias, columns), labels[rows] - columns.start)
        entropies, log_collisions = sums.entropies(), sums.log_collisions()
        correct, mean_logits = (sums.own >= sums.highest).float(), sums.plain / weight.shape[0]
        ctx.save_for_backward(hidden, weight, bias, labels, sums.log_z(), entropies)
        ctx.mark_non_differentiable(correct, mean_logits, log_collisions)
        ctx.set_materialize_grads(False)
        return sums.logps(), entropies, correct, mean_logits, log_collisions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight, bias, labels, log_z, entropies = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        of_logps = grads[0] if grads[0] is not None else torch.zeros_like(log_z)
        of_entropies = None if grads[1] is None else torch.stack([grads[1], entropies])
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if to_hidden else None
        grad_weight = torch.empty_like(weight) if to_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if to_bias else None
        tile = _TILES[hidden.device.type]
        for columns in _spans(weight.shape[0], tile.entries):
            of_columns = torch.zeros_like(weight[columns], dtype=torch.float32) if to_weight else None
            for rows in _spans(hidden.shape[0], tile.tokens):
                logits, own = _logits(hidden[rows], weight, bias, columns), labels[rows] - columns.start
                slopes = None if of_entropies is None else of_entropies[:, rows]
                gradient = _logit_gradient(logits, own, log_z[rows], of_logps[rows], slopes)
                if grad_bias is not None:
                    grad_bias[columns] += gradient.sum(0)
                narrow = gradient.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] += narrow @ weight[columns]
                if of_columns is not None:
                    of_columns += narrow.T @ hidden[rows]
            if grad_weight is not None and of_columns is not None:
                grad_weight[columns] = of_columns
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            grad_weight,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )


def _spans(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: slice) -> Tensor:
    """fp32, in memory of their own."""
    return linear(hidden, weight[columns], None if bias is None else bias[columns]).float()


def _logit_gradient(logits: Tensor, own: Tensor, log_z: Tensor, of_logps: Tensor, slopes: Tensor | None) -> Tensor:
    """d log p(y) / dz = onehot(y) - p; dH / dz = -p (log p + H). `logits` is overwritten and returned.

    `slopes` [2, R] are the gradient of each entropy, and the entropy. `own` [R] are the labels' columns.
    """
    log_p = logits.sub_(log_z[:, None])
    if slopes is None:
        gradient = log_p.exp_().mul_(-of_logps[:, None])
    else:
        scale = (log_p + slopes[1, :, None]).mul_(-slopes[0, :, None]).sub_(of_logps[:, None])
        gradient = log_p.exp_().mul_(scale)
    last = logits.shape[1] - 1
    here = torch.where((own >= 0) & (own <= last), of_logps, 0.0)
    return gradient.scatter_add_(-1, own.clamp(0, last)[:, None], here[:, None])
