"""Whether a model gives the same in our rows as transformers' own eager forward pass of each sequence alone."""

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raylign.errors import ModelError
from raylign.records import Completions
from raylign.training.backbone import PaddedAttention, inner_model
from raylign.training.logprobs import CompletionScores
from raylign.training.plain_forward import as_transformers, configs_of, in_float32, narrow_windows
from raylign.training.sequences import Layout, TokenBatch, token_batch

log = logging.getLogger(__name__)

_WINDOW = 16
"""Attention windows are narrowed to as many tokens; every row of the check is longer."""
_SHAPES = ((5, (18,)), (20, (24, 11)), (9, (14,)))
"""Tokens of each prompt and of its completions."""
_COMPLETIONS = sum(len(completions) for _, completions in _SHAPES)
_TOKENS = 4096
"""Token ids of the check are below this."""
_MESSAGE = 200
"""Characters of an error of transformers that are told."""
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Largest difference of a token's log-prob (nats) or of a reward (1, or its size where that is more), by the dtype that
the model computes in here: float32 unless its code narrows by itself."""


class ScoredModule(Protocol):
    """What `CompletionLogps` and `CompletionRewards` have in common: both are modules."""

    model: nn.Module
    padded_attention: PaddedAttention

    def __call__(self, batch: TokenBatch) -> CompletionScores | Tensor:
        """Log-probs of completions, or their rewards."""

    def own_values(self, prompt: Sequence[int], completion: Sequence[int], device: torch.device) -> Tensor:
        """What transformers' own forward says of one unpadded row: a log-prob per token, or a reward [1]."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far a layout is from transformers: `gap` is infinite where the model cannot run it, for `reason`."""

    exact: bool
    gap: float
    reason: str


def supported_layout(modules: Sequence[ScoredModule], wanted: Layout, device: torch.device) -> Layout:
    """`wanted` where all of `modules` compute in it what transformers computes, else `padded`.

    Each is a `CompletionLogps` or `CompletionRewards`, and is told which attention of transformers its padded rows
    take. Raises ModelError when a model has no exact layout.
    """
    verdicts = [_check(module, wanted, device) for module in modules]
    if wanted != "padded" and not all(verdict.exact for verdict in verdicts):
        for module, verdict in zip(modules, verdicts, strict=True):
            if not verdict.exact:
                log.warning("%s cannot be packed (%s); taking padded rows", _kind(module), verdict.reason)
        verdicts = [_check(module, "padded", device) for module in modules]
        wanted = "padded"
    for module, verdict in zip(modules, verdicts, strict=True):
        if not verdict.exact:
            raise ModelError(
                f"model type {_kind(module)!r} gives what transformers gives neither packed nor padded: "
                f"{verdict.reason}; take an architecture that deploy/architectures.md lists as packed or padded"
            )
    return wanted


def _check(module: ScoredModule, layout: Layout, device: torch.device) -> Verdict:
    """Padded rows may take either attention of transformers; the one that is exact is kept, the faster one first."""
    attentions: tuple[PaddedAttention, ...] = ("sdpa", "eager") if layout == "padded" else ("sdpa",)
    verdict = Verdict(False, math.inf, "")
    for attention in attentions:
        module.padded_attention = attention
        verdict = compare(module, layout, device)
        if verdict.exact and has_kernels_of_its_own(device, inner_model(module.model).dtype):
            verdict = compare(module, layout, device, in_own_dtype=True)
        if verdict.exact:
            break
    return verdict


def has_kernels_of_its_own(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows in `dtype` take kernels there that rows in float32 do not, as those of FlashAttention on GPUs."""
    return device.type == "cuda" and dtype != torch.float32


def compare(module: ScoredModule, layout: Layout, device: torch.device, *, in_own_dtype: bool = False) -> Verdict:
    """`module` in rows of `layout` against transformers, in float32 and with attention windows that the rows pass.

    `in_own_dtype`: both in the dtype of its weights, whose tolerance is wider.
    """
    inner = inner_model(module.model)
    before, groups = (_groups(inner, seed) for seed in (1, 2))
    before[1] = groups[1]
    with torch.no_grad(), narrow_windows(inner, _WINDOW), nullcontext() if in_own_dtype else in_float32(inner):
        try:
            beside_others, found = (_values(module, row, layout, device) for row in (before, groups))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            problem = " ".join(str(error).split())[:_MESSAGE]
            return Verdict(False, math.inf, f"it cannot run {layout} rows ({type(error).__name__}: {problem})")
        with as_transformers(inner):
            own = [module.own_values(group.prompt, ids, device) for group in groups for ids in group.completions]
            begun = module.own_values(groups[0].prompt, groups[0].completions[0][:-1], device)
    tolerance = _TOLERANCE[inner.dtype if in_own_dtype else own[0].dtype]
    gap = float((found - torch.cat(own)).abs().max())
    middle = [_middle(values, own) for values in (beside_others, found)]
    if not math.isfinite(gap):
        return Verdict(False, math.inf, "what it computes is not finite")
    if len(begun) > 1 and not _near(begun, own[0][:-1], tolerance):
        return Verdict(False, math.inf, "its own log-probs depend on later tokens: it is no causal language model")
    if not torch.equal(*middle):
        return Verdict(False, gap, f"in {layout} rows a sequence depends on its neighbours")
    unit = "nats for a token" if len(found) > len(own) else "for a reward"
    problem = f"{layout} rows differ from transformers' own by {gap:.3g} {unit}"
    return Verdict(_near(found, torch.cat(own), tolerance), gap, problem)


def _middle(values: Tensor, own: list[Tensor]) -> Tensor:
    """Of the two completions in the middle, which have neighbours on both sides."""
    return torch.cat(torch.split(values, list(map(len, own)))[1:3])


def _near(found: Tensor, own: Tensor, tolerance: float) -> bool:
    """NaN is near nothing."""
    size = own.abs().clamp(min=1.0) if len(own) == _COMPLETIONS else 1.0
    return bool(((found - own).abs() / size).max() < tolerance)


def _groups(inner: PreTrainedModel, seed: int) -> list[Completions]:
    """Of random tokens, but for those that mean something to the model's code: padding, pictures, ends."""
    config = inner.config.get_text_config()
    options = [pair for part in configs_of(inner) for pair in part.to_dict().items()]
    named = [id for name, value in options if "token" in name for id in (value if isinstance(value, list) else [value])]
    usable = [token for token in range(min(config.vocab_size, _TOKENS)) if token not in named]
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return [usable[index] for index in torch.randint(len(usable), (length,), generator=generator).tolist()]

    return [Completions(draw(prompt), [draw(length) for length in lengths]) for prompt, lengths in _SHAPES]


def _values(module: ScoredModule, groups: list[Completions], layout: Layout, device: torch.device) -> Tensor:
    """A log-prob per token, or a reward per completion."""
    found = module(token_batch(groups, layout, 0).to(device))
    return found if isinstance(found, Tensor) else found.tokens.logps


def _kind(module: ScoredModule) -> str:
    return str(inner_model(module.model).config.model_type)
