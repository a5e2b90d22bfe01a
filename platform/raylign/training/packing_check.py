"""Whether a model keeps the completions of a packed row apart."""

import torch
from torch import Tensor, nn

from raylign.training.logprobs import CompletionScores
from raylign.training.sequences import Completions, Layout, token_batch

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Largest difference of a token's log-prob (nats) or a completion's reward between a packed row and padded rows."""


def packs_exactly(module: nn.Module, vocabulary: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether neighbours in a packed row change nothing, and what it gives is what padded rows give.

    `module` is a `CompletionLogps` or a `CompletionRewards`. Architectures with another attention, or with
    state beside it, do not pass.
    """
    before = [_group(1, vocabulary), _group(2, vocabulary)]
    after = [_group(1, vocabulary), _group(3, vocabulary)]
    try:
        first, second = (_values(module, groups, "shared", device) for groups in (before, after))
        padded = _values(module, before, "padded", device)
    except (TypeError, ValueError):
        return False
    own = len(first) // 2  # of the first group: both have the same shape
    return torch.equal(first[:own], second[:own]) and bool((first - padded).abs().max() < _TOLERANCE[dtype])


def _group(seed: int, vocabulary: int) -> Completions:
    """A prompt of 5 tokens and completions of 4 and 3."""
    ids = torch.randint(vocabulary, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Completions(ids[:5], [ids[5:9], ids[9:]])


def _values(module: nn.Module, groups: list[Completions], layout: Layout, device: torch.device) -> Tensor:
    """A log-prob per token, or a reward per completion."""
    with torch.no_grad():
        found: CompletionScores | Tensor = module(token_batch(groups, layout, 0).to(device))
    return found if isinstance(found, Tensor) else found.tokens.logps
