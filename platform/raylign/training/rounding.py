"""fp32 weights into bf16 by stochastic rounding, so that updates far below bf16's steps still move the policy.

A weight of 0.15 has neighbours 0.001 away in bf16. At a learning rate of 5e-6 a hundred AdamW steps carry its fp32
master half that far at most: rounded to the nearest, it never moves. Rounded up with a probability that is its distance
from the lower neighbour, its expectation is the master's value (Gupta et al. 2015, arXiv 1502.02551, section 4; Zamirai
et al. 2020, arXiv 2010.06192).
"""

from itertools import count

import torch
from torch import Tensor

_BLOCK = 1 << 18
"""Elements rounded at a time, which the caches hold."""
_ODD = 2654435761
"""Knuth's multiplier: parts that follow each other take noise from places far apart."""


class StochasticRounding:
    """Rounds what a step has changed: equal steps round equally, on all ranks and devices, and after a resume."""

    def __init__(self, step: int, device: torch.device) -> None:
        noise = torch.randint(1 << 16, (_BLOCK,), dtype=torch.int32, generator=torch.Generator().manual_seed(step))
        self._noise = noise.repeat(2).to(device)
        self._bits = torch.empty_like(self._noise[:_BLOCK])

    def round(self, source: Tensor, target: Tensor, start: int) -> None:
        """Put the contiguous fp32 `source` into the contiguous `target`, each element up or down to a value of bf16.

        Uniform bits below bf16's last one are added and then cut off, which carries into it with the right probability
        for either sign. Values that bf16 holds, infinities among them, stay as they are. `start` is the place of the
        first element among all that the step has changed; blocks take one and the same noise, each from a place of its
        own.
        """
        parts = zip(*(torch.split(tensor.view(-1), _BLOCK) for tensor in (source, target)), strict=True)
        for place, (given, taken) in zip(count(start, _BLOCK), parts, strict=False):
            shift, bits = (place * _ODD & 0xFFFFFFFF) >> 14, self._bits[: given.numel()]
            torch.add(given.view(torch.int32), self._noise[shift : shift + given.numel()], out=bits)
            taken.copy_(bits.bitwise_and_(-1 << 16).view(torch.float32))
