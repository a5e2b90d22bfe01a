"""Log-probabilities of given tokens under a linear output head, without a [N, V] tensor of logits."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

_CHUNK_BYTES = 96 << 20


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
        logps, entropies, correct, mean_logits, log_collisions, log_z = out
        for rows, logits in _logit_chunks(hidden, weight, bias):
            highest, greedy = logits.max(-1)
            correct[rows] = (greedy == labels[rows]).float()
            shifted = logits.sub_(highest[:, None])
            weights = shifted.exp()
            total = weights.sum(-1)
            log_total = total.log()
            logps[rows] = shifted.gather(-1, labels[rows, None])[:, 0] - log_total
            # H = log sum_v exp(z_v) - E[z]
            entropies[rows] = log_total - torch.linalg.vecdot(weights, shifted) / total
            log_collisions[rows] = torch.linalg.vecdot(weights, weights).log() - 2 * log_total
            log_z[rows] = highest + log_total
        mean_logits.copy_(_mean_logits(hidden, weight, bias))
        ctx.save_for_backward(hidden, weight, bias, labels, log_z, entropies)
        ctx.mark_non_differentiable(correct, mean_logits, log_collisions)
        ctx.set_materialize_grads(False)
        return logps, entropies, correct, mean_logits, log_collisions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight, bias, labels, log_z, entropies = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        of_logps = grads[0] if grads[0] is not None else torch.zeros_like(log_z)
        grad_hidden = torch.empty_like(hidden) if to_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if to_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if to_bias else None
        for rows, logits in _logit_chunks(hidden, weight, bias):
            of_entropy = None if grads[1] is None else (grads[1][rows], entropies[rows])
            grad = _logit_gradient(logits, labels[rows], log_z[rows], of_logps[rows], of_entropy)
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


def _logit_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """fp32 logits of some rows after another, all in the same memory."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    size = max(1, min(rows, _CHUNK_BYTES // (4 * vocabulary)))
    buffer = hidden.new_empty((size, vocabulary), dtype=torch.float32)
    for start in range(0, rows, size):
        chunk = slice(start, min(start + size, rows))
        yield chunk, buffer[: chunk.stop - start].copy_(linear(hidden[chunk], weight, bias))


def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The mean over the vocabulary is linear."""
    means = hidden.float() @ weight.mean(0, dtype=torch.float32)
    return means if bias is None else means + bias.float().mean()


def _logit_gradient(
    logits: Tensor, labels: Tensor, log_z: Tensor, of_logps: Tensor, of_entropy: tuple[Tensor, Tensor] | None
) -> Tensor:
    """d log p(y) / dz = onehot(y) - p; dH / dz = -p (log p + H). `logits` is overwritten and returned."""
    log_p = logits.sub_(log_z[:, None])
    if of_entropy is None:
        gradient = log_p.exp_().mul_(-of_logps[:, None])
    else:
        slope, entropies = of_entropy
        scale = (log_p + entropies[:, None]).mul_(-slope[:, None]).sub_(of_logps[:, None])
        gradient = log_p.exp_().mul_(scale)
    return gradient.scatter_add_(-1, labels[:, None], of_logps[:, None])
