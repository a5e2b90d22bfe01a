"""Sums over a vocabulary whose logits come in tiles; Milakov and Gimelshein (2018), algorithm 3."""

from dataclasses import dataclass

import torch
from torch import Tensor

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
