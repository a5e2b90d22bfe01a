"""Texts through a model of ours: in batches of like length, and no further than it makes sense."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from raylign.config.scoring import ModelScoringBlock
from raylign.errors import ScorerError
from raylign.models.open import limit_of, longest_sequence
from raylign.records import Score
from raylign.scoring.base import most_unscored, skipped

Part = TypeVar("Part")


def in_batches(
    parts: Sequence[Part | Score],
    plan: Callable[[Mapping[int, Part]], Sequence[Sequence[int]]],
    forward: Callable[[Sequence[Part]], Sequence[Score]],
    block: ModelScoringBlock,
    allowed: int | None,
) -> list[Score]:
    """Scores in the order of `parts`. A part is the model's input, or a score already: unscored.

    `plan` puts inputs by index into batches, `forward` runs one. Nothing runs any more once more than `allowed` parts
    are unscored; None takes a share of `max_unscored`. Raises ScorerError when the GPU has too little memory.
    """
    most = most_unscored(len(parts), block.max_unscored) if allowed is None else allowed
    scores = {index: part for index, part in enumerate(parts) if isinstance(part, Score)}
    inputs = {index: part for index, part in enumerate(parts) if not isinstance(part, Score)}
    unscored = len(scores)
    for batch in plan(inputs):
        if unscored > most:
            found: Sequence[Score] = [skipped(block.max_unscored)] * len(batch)
        else:
            found = _run(forward, [inputs[index] for index in batch], block)
        unscored += sum(score.value is None for score in found)
        scores |= dict(zip(batch, found, strict=True))
    return [scores[index] for index in range(len(parts))]


def _run(
    forward: Callable[[Sequence[Part]], Sequence[Score]], inputs: Sequence[Part], block: ModelScoringBlock
) -> Sequence[Score]:
    try:
        with torch.no_grad():
            return forward(inputs)
    except torch.OutOfMemoryError as error:
        raise ScorerError(
            f"{len(inputs)} completions do not fit the scorer's GPU memory ({error}); lower "
            f"scoring.max_tokens_per_batch={block.max_tokens_per_batch} or scoring.batch_size={block.batch_size}, "
            "or leave it more beside generators.gpu_memory_utilization"
        ) from error


def by_length(lengths: Mapping[int, int], block: ModelScoringBlock) -> list[list[int]]:
    """Batches of indices, the longest first, within `batch_size` and, padding included, `max_tokens_per_batch`."""
    batches: list[list[int]] = []
    for index in sorted(lengths, key=lambda index: -lengths[index]):
        last = batches[-1] if batches else []
        width = lengths[last[0]] if last else 0
        if last and len(last) < block.batch_size and width * (len(last) + 1) <= block.max_tokens_per_batch:
            last.append(index)
        else:
            batches.append([index])
    return batches


def fault_of(completion: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Why a completion is not read, "" if it is: no Unicode, or it writes a special token of the model.

    With such a token a policy could end its turn and praise itself in the next one.
    """
    try:
        completion.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"not valid Unicode: half a surrogate pair at character {error.start}"
    written = [token for token in tokenizer.all_special_tokens if token in completion]
    return f"writes a special token of the scorer's model: {written[0]!r}" if written else ""


def finite(value: float, parts: Mapping[str, float] | None = None) -> Score:
    """The score, unless the number is none."""
    return Score(value, parts or {}) if math.isfinite(value) else Score(None, reason=f"the model gave {value}")


def too_long(tokens: int, limit: int) -> Score:
    """The score of a conversation that does not fit."""
    return Score(None, reason=f"too long: {tokens} tokens of prompt and completion, limit {limit}")


def length_limit(block: ModelScoringBlock, configs: Sequence[PreTrainedConfig], folder: str) -> int:
    """Tokens of prompt and completion, at most. Raises ScorerError when a model reads fewer, or tells no number.

    `configs` are those of all models that read them, the first of them in `folder`.
    """
    known = [(limit, limit_of(config)) for config in configs if (limit := longest_sequence(config)) is not None]
    positions, what = min(known, default=(None, ""))
    if block.max_length is None:
        if positions is None:
            raise ScorerError(f"{folder}: config.json has no max_position_embeddings; set scoring.max_length")
        return positions
    if positions is not None and block.max_length > positions:
        raise ScorerError(f"scoring.max_length={block.max_length} exceeds the {positions} {what} of {folder}; lower it")
    return block.max_length
