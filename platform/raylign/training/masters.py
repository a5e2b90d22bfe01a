"""fp32 weights into bf16 by stochastic rounding, so that updates far below bf16's steps still move the policy.

A weight of 0.15 has neighbours 0.001 away in bf16. At a learning rate of 5e-6 a hundred AdamW steps carry its fp32
master half that far at most: rounded to the nearest, it never moves. Rounded up with a probability that is its distance
from the lower neighbour, its expectation is the master's value (Gupta et al. 2015, arXiv 1502.02551, section 4; Zamirai
et al. 2020, arXiv 2010.06192).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Literal

import torch
from torch import Tensor, nn

from raylign.config.blocks import TrainerBlock

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


Kind = Literal["weights", "exp_avg", "exp_avg_sq"]
"""Of a parameter's tensors: the fp32 weights, and AdamW's first and second moment."""


def adamw(parameters: Iterable[Tensor], block: TrainerBlock) -> torch.optim.AdamW:
    """PyTorch's AdamW in one pass over memory."""
    return torch.optim.AdamW(
        parameters,
        lr=block.learning_rate,
        betas=(block.adam_beta1, block.adam_beta2),
        eps=block.adam_epsilon,
        weight_decay=block.weight_decay,
        fused=True,
    )


class MasterWeights:
    """fp32 weights, equal to the given parameters at the start; a step changes them and rounds them into these.

    Gradients of several backward passes add up in fp32 (Micikevicius et al. 2018, arXiv 1710.03740): one in 16 bits is
    added to the `grad` of its master and freed as soon as autograd has it. A parameter in fp32 is its own master.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], block: TrainerBlock) -> None:
        """`parameters` are the trained ones by name, each once, where they stay."""
        self._parameters = dict(parameters)
        self._masters = {name: _master(parameter) for name, parameter in parameters.items()}
        self._max_norm = block.max_grad_norm
        self._adamw = adamw(self._masters.values(), block)

    def gradients(self) -> list[Tensor]:
        """The fp32 sums since the last step, in the order of the parameters; change them in place.

        A parameter that took part in no backward pass has zeros, so that ranks agree and AdamW's moments decay as
        under ZeRO.
        """
        found = []
        for master in self._masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master, requires_grad=False)
            found.append(master.grad)
        return found

    def step(self, rate: float) -> float | None:
        """AdamW at learning rate `rate` on the clipped gradients, which are freed.

        Returns their global norm before clipping; None when it is not finite, and then nothing changes.
        """
        gradients = self.gradients()
        norm = global_norm(gradients)
        finite = math.isfinite(norm)
        if finite:
            if self._max_norm:
                share = min(1.0, self._max_norm / (norm + 1e-6))
                for gradient in gradients if share < 1 else ():
                    gradient.mul_(share)
            for group in self._adamw.param_groups:
                group["lr"] = rate
            self._adamw.step()
            self.round()
        self._adamw.zero_grad()
        return norm if finite else None

    def round(self) -> None:
        """Put the weights into the parameters as the last step did: into bf16 by stochastic rounding."""
        start, state = 0, next(iter(self._adamw.state.values()), {"step": 0})
        rounding = StochasticRounding(int(state["step"]), next(iter(self._masters.values())).device)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if parameter.dtype == torch.bfloat16:
                    rounding.round(self._masters[name], parameter.detach(), start)
                elif parameter is not self._masters[name]:
                    parameter.copy_(self._masters[name])
                start += parameter.numel()

    def tensors(self) -> Iterator[Tensor]:
        """Masters, moments and gradients. A parameter in fp32 is its own master."""
        for master in self._masters.values():
            yield master
            if master.grad is not None:
                yield master.grad
        for state in self._adamw.state.values():
            yield from state.values()

    def names(self) -> tuple[str, ...]:
        return tuple(self._parameters)

    def numel(self) -> int:
        return sum(master.numel() for master in self._masters.values())

    def has_moments(self) -> bool:
        """Whether a step was taken or moments were made."""
        return bool(self._adamw.state)

    def make_moments(self, steps: int) -> None:
        """Moments to write to, as after `steps` steps."""
        for master in self._masters.values():
            state = self._adamw.state[master]
            state["step"] = torch.tensor(float(steps), device=master.device)
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind] = torch.zeros_like(master, requires_grad=False)

    def read(self, name: str, kind: Kind) -> Tensor:
        """The tensor itself, fp32 and whole."""
        master = self._masters[name]
        found: Tensor = master.detach() if kind == "weights" else self._adamw.state[master][kind]
        return found

    def write(self, name: str, kind: Kind, value: Tensor) -> None:
        self.read(name, kind).copy_(value)
        if kind == "weights":
            self._parameters[name].detach().copy_(value)


def global_norm(gradients: Iterable[Tensor]) -> float:
    """Euclidean norm of all of them together.

    Rows come first, and add up in fp64: PyTorch's fp32 norm of a whole tensor on CPUs is 1.6e-3 too small at 28 million
    elements.
    """
    rows = [torch.linalg.vector_norm(gradient, dim=-1 if gradient.ndim else None) for gradient in gradients]
    squares = [row.double().square().sum() for row in rows]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    master = parameter.detach().float()

    def take(source: Tensor) -> None:
        gradient = source.grad
        assert gradient is not None
        source.grad = None
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)

    parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
    return master
