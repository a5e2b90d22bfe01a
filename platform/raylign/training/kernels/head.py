"""Sums over a vocabulary whose logits come in tiles; Milakov and Gimelshein (2018), algorithm 3."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

_LOWEST = torch.finfo(torch.float32).min
"""In place of -inf, whose difference with itself is no number."""


@dataclass(frozen=True, slots=True)
class LogitSums:
    """Of N tokens' logits z seen so far, fp32 [N] each; p~ = exp(z - highest).

    `own` is the label's logit, `total` is sum p~, `expected` sum p~ (z - highest), `squares` sum p~^2, `plain` sum z.
    """

    highest: Tensor
    own: Tensor
    total: Tensor
    expected: Tensor
    squares: Tensor
    plain: Tensor

    @classmethod
    def none(cls, tokens: int, device: torch.device) -> "LogitSums":
        zeros = torch.zeros(5, tokens, device=device)
        return cls(torch.full((tokens,), _LOWEST, device=device), *zeros)

    def add(self, rows: slice, logits: Tensor, own: Tensor) -> None:
        """Count the fp32 tile `logits` [R, C] of the tokens `rows`, overwriting it.

        `own` [R] is the column of each label, outside of 0..C-1 where another tile has it.
        """
        _, columns = logits.shape
        inside = (own >= 0) & (own < columns)
        found = logits.gather(-1, own.clamp(0, columns - 1)[:, None])[:, 0]
        self.own[rows] = torch.where(inside, found, self.own[rows])
        self.plain[rows] += logits.sum(-1)
        self._raise(rows, logits.amax(-1))
        shifted = logits.sub_(self.highest[rows, None])
        weights = shifted.exp()
        self.total[rows] += weights.sum(-1)
        self.expected[rows] += shifted.mul_(weights).sum(-1)
        self.squares[rows] += weights.square_().sum(-1)

    def of(self, rows: slice) -> tuple[Tensor, ...]:
        """Views of all six, in the order of the fields."""
        sums = (self.highest, self.own, self.total, self.expected, self.squares, self.plain)
        return tuple(part[rows] for part in sums)

    def _raise(self, rows: slice, highest: Tensor) -> None:
        """What was summed relative to the old maximum is rescaled to the new one."""
        new = torch.maximum(self.highest[rows], highest)
        drop = self.highest[rows] - new
        factor = drop.exp()
        self.highest[rows] = new
        self.expected[rows] = factor * (self.expected[rows] + drop * self.total[rows])
        self.total[rows] *= factor
        self.squares[rows] *= factor.square()

    def log_z(self) -> Tensor:
        """[N] log sum_v exp(z_v)."""
        return self.highest + self.total.log()

    def logps(self) -> Tensor:
        """[N] log p of the label."""
        return (self.own - self.highest) - self.total.log()

    def entropies(self) -> Tensor:
        """[N] H = log sum exp(z) - E[z]."""
        return self.total.log() - self.expected / self.total

    def log_collisions(self) -> Tensor:
        """[N] log sum_v p(v)^2."""
        return self.squares.log() - 2 * self.total.log()


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
                _count(sums, rows, _logits(hidden[rows], weight, bias, columns), labels[rows] - columns.start)
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
                gradient = _gradient(logits, own, log_z[rows], of_logps[rows], slopes)
                if grad_bias is not None:
                    grad_bias[columns] += gradient.sum(0, dtype=torch.float32)
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
    """In memory of their own."""
    return linear(hidden, weight[columns], None if bias is None else bias[columns])


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _fused(logits: Tensor) -> bool:
    """Whether one kernel takes the whole of a tile."""
    return logits.device.type == "cuda" and _has_triton()


def _count(sums: LogitSums, rows: slice, logits: Tensor, own: Tensor) -> None:
    if not _fused(logits):
        sums.add(rows, logits.float(), own)
        return
    from raylign.training.kernels.head_triton import fold  # noqa: PLC0415 - Triton, for GPUs alone

    fold(logits, own, sums.of(rows))


def _gradient(logits: Tensor, own: Tensor, log_z: Tensor, of_logps: Tensor, slopes: Tensor | None) -> Tensor:
    """Of the tile, overwriting it: in fp32 or, by one kernel, in its own dtype."""
    if not _fused(logits):
        return _logit_gradient(logits.float(), own, log_z, of_logps, slopes)
    from raylign.training.kernels.head_triton import logit_gradient  # noqa: PLC0415 - Triton, for GPUs alone

    return logit_gradient(logits, own, log_z, of_logps, slopes)


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
