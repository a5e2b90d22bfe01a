"""Floating-point operations that a DPO step needs, from the architecture, and the rate of a machine."""

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from tests.benchmarks.harness.pairs import TokenPair

_MINIMUM_S = 0.5
TRAINED, SCORED = 6, 2
"""Operations per weight and token: a forward pass takes 2 (multiply, add), the backward pass twice as many."""


def step_flops(config: PreTrainedConfig, pairs: Sequence[TokenPair], per_weight: int) -> float:
    """Operations for `pairs` under a Llama-like `config`, counted per real token, every prompt once per completion."""
    return sum(
        sequence_flops(config, len(pair.prompt), len(completion), per_weight)
        for pair in pairs
        for completion in (pair.chosen, pair.rejected)
    )


def sequence_flops(config: PreTrainedConfig, prompt: int, completion: int, per_weight: int) -> float:
    """Operations for a prompt and a completion of so many tokens.

    Linear layers: `per_weight` operations a weight and token; the output head on completion tokens only. Attention:
    scores and values over the causal half, tokens^2 x width multiplications in each forward pass.
    """
    tokens, layers = prompt + completion, config.num_hidden_layers
    linear = layer_weights(config) * layers * tokens + config.vocab_size * config.hidden_size * completion
    attention = layers * config.num_attention_heads * _head(config) * tokens**2
    return float(per_weight * (linear + attention))


def layer_weights(config: PreTrainedConfig) -> int:
    """Weights in the matrix products of one layer."""
    return sum(rows * columns for rows, columns in layer_shapes(config))


def layer_shapes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers of one Llama-like layer."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, _head(config)
    query, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    attention = [(hidden, query), (hidden, keys), (hidden, keys), (query, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


def _head(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def matmul_rate(config: PreTrainedConfig, tokens: int, device: torch.device) -> float:
    """bf16 operations a second over the linear layers of one layer and the head, on `tokens` rows.

    Every shape is multiplied as in training: forward, and the backward products for inputs and for weights.
    """
    shapes = [*layer_shapes(config) * config.num_hidden_layers, (config.hidden_size, config.vocab_size)]
    operations = seconds = 0.0
    for shape in sorted(set(shapes)):
        taken = shapes.count(shape) * _product_seconds(shape, tokens, device)
        operations += shapes.count(shape) * TRAINED * shape[0] * shape[1] * tokens
        seconds += taken
    return operations / seconds


def _product_seconds(shape: tuple[int, int], tokens: int, device: torch.device) -> float:
    """Seconds for X W^T, G W and G^T X."""
    inputs, outputs = shape
    x = torch.randn(tokens, inputs, device=device).bfloat16()
    weight = torch.randn(outputs, inputs, device=device).bfloat16()
    gradient = torch.randn(tokens, outputs, device=device).bfloat16()

    def once() -> None:
        torch.nn.functional.linear(x, weight)
        torch.mm(gradient, weight)
        torch.mm(gradient.T, x)

    once()
    rounds, started = 0, time.perf_counter()
    while rounds < 3 or time.perf_counter() - started < _MINIMUM_S:
        once()
        rounds += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / rounds
