"""Log-probabilities of given tokens under a linear output head, without a [N, V] tensor of logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CHUNK_BYTES = 64 << 20


class TokenScores(NamedTuple):
    """What the head says of N tokens; all are fp32 [N].

    `logps` (nats) and `entropies` (nats) carry gradients. Detached: `correct` is 1 where the greedy token is the
    label, `mean_logits` averages over the vocabulary, `log_collisions` is log sum_v p(v)^2.
    """

    logps: Tensor
    entropies: Tensor
    correct: Tensor
    mean_logits: Tensor
    log_collisions: Tensor


def linear_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> TokenScores:
    """Scores of `labels` [N] for logits = hidden [N, H] @ weight [V, H]^T + bias [V]; log-sum-exp is fp32.

    Chunks of rows bound the memory, whatever N and V; the backward pass computes the logits again.
    """
    return TokenScores(*_LinearScores.apply(hidden, weight, bias, labels))  # type: ignore[no-untyped-call]


class _LinearScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        out = hidden.new_empty((6, hidden.shape[0]), dtype=torch.float32)
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            logits = _logits(hidden[rows], weight, bias)
            out[3, rows] = logits.mean(-1)
            highest, greedy = logits.max(-1)
            out[0, rows] = logits.gather(-1, labels[rows, None])[:, 0]
            out[2, rows] = (greedy == labels[rows]).float()
            weights = logits.sub(highest[:, None]).exp_()
            total = weights.sum(-1)
            out[5, rows] = highest + total.log()
            # H = log Z - E[logit]
            out[1, rows] = out[5, rows] - torch.linalg.vecdot(weights, logits) / total
            out[4, rows] = torch.linalg.vecdot(weights, weights).log() - 2 * total.log()
        logps, entropies, correct, mean_logits, log_collisions, log_z = out
        logps -= log_z
        ctx.save_for_backward(hidden, weight, bias, labels, log_z, entropies)
        ctx.mark_non_differentiable(correct, mean_logits, log_collisions)
        ctx.set_materialize_grads(False)
        return logps, entropies, correct, mean_logits, log_collisions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight, bias, labels, log_z, entropies = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        of_logps, of_entropies = grads[:2]
        grad_hidden = torch.empty_like(hidden) if to_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if to_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if to_bias else None
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            logits = _logits(hidden[rows], weight, bias)
            grad = _logit_gradient(logits, labels[rows], log_z[rows], entropies[rows], of_logps, of_entropies, rows)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            narrow = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = narrow @ weight
            if grad_weight is not None:
                grad_weight += narrow.T @ hidden[rows]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(hidden, weight, bias).float()


def _logit_gradient(
    logits: Tensor,
    labels: Tensor,
    log_z: Tensor,
    entropies: Tensor,
    of_logps: Tensor | None,
    of_entropies: Tensor | None,
    rows: slice,
) -> Tensor:
    """d log p(y) / dz = onehot(y) - p; dH / dz = -p (log p + H). `logits` is overwritten."""
    log_p = logits.sub_(log_z[:, None])
    if of_entropies is None:
        gradient = log_p.exp_()
        gradient *= -of_logps[rows, None] if of_logps is not None else 0.0
    else:
        scale = log_p + entropies[:, None]
        scale *= -of_entropies[rows, None]
        if of_logps is not None:
            scale -= of_logps[rows, None]
        gradient = scale.mul_(log_p.exp_())
    if of_logps is not None:
        gradient.scatter_add_(-1, labels[:, None], of_logps[rows, None])
    return gradient


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, _CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
