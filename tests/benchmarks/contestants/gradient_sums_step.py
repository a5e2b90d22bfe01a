"""Optimizer steps of many backward passes on a random model, with gradients added up in fp32 or in bf16."""

import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from raylign.config.base import Block
from raylign.config.blocks import TrainerBlock
from raylign.training.masters import MasterWeights, adamw
from tests.benchmarks.harness.children import contestant, progress


class SumsJob(Block):
    """`passes` backward passes of `tokens` tokens a step."""

    sums: Literal["float32", "bfloat16"]
    layers: int
    tokens: int
    passes: int
    steps: int
    threads: int


class SumsResult(Block):
    """Seconds of each step after the first, and how far 64 gradients added up in bf16 are from their exact sum."""

    step_s: tuple[float, ...]
    off: float


class SummedAsTheyAre(MasterWeights):
    """The same masters; gradients add up in the dtype of the weights, as autograd leaves them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], block: TrainerBlock) -> None:
        self._parameters = dict(parameters)
        self._masters = {name: parameter.detach().float() for name, parameter in parameters.items()}
        self._max_norm = block.max_grad_norm
        self._adamw = adamw(self._masters.values(), block)

    def step(self, rate: float) -> float | None:
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None
            self._masters[name].grad, parameter.grad = parameter.grad.float(), None
        return super().step(rate)


def run(job: SumsJob) -> SumsResult:
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    config = LlamaConfig(vocab_size=8192, num_hidden_layers=job.layers, tie_word_embeddings=True, **shape)
    model = LlamaForCausalLM(config)
    nn.Module.to(model, torch.bfloat16)
    parameters = dict(model.named_parameters())
    masters = (MasterWeights if job.sums == "float32" else SummedAsTheyAre)(parameters, TrainerBlock())
    seconds = []
    for number in range(job.steps):
        began = time.monotonic()
        for _ in range(job.passes):
            ids = torch.randint(config.vocab_size, (1, job.tokens))
            model(ids, labels=ids).loss.backward()
        masters.step(1e-5)
        seconds.append(time.monotonic() - began)
        progress(f"step {number + 1} of {job.steps}: {seconds[-1]:.1f} s")
    return SumsResult(step_s=tuple(seconds[1:]), off=_off(64))


def _off(passes: int) -> float:
    """Relative distance of the sum of `passes` random gradients in bf16 from the exact one."""
    gradients = [torch.randn(1 << 20).mul_(1e-3).add_(1e-3).bfloat16() for _ in range(passes)]
    exact: Tensor = torch.stack([gradient.double() for gradient in gradients]).sum(0)
    rounded = gradients[0].clone()
    for gradient in gradients[1:]:
        rounded += gradient
    return float((rounded.double() - exact).norm() / exact.norm())


if __name__ == "__main__":
    contestant(run, SumsJob)
