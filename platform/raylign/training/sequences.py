"""Prompts with their completions into the tensors of one forward pass, packed or padded."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from raylign.records import Completions

Layout = Literal["shared", "packed", "padded"]
"""`shared`: a prompt once for all its completions; `packed`: once per completion; `padded`: one row per completion."""


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; a copy from the host to a GPU is queued behind the work there, and nobody waits for it.

    Only pinned memory is copied without a wait; PyTorch keeps it until the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True, slots=True)
class Segment:
    """Where a prompt [start, start + prompt) and its completions, one after another, stand in a packed row."""

    start: int
    prompt: int
    completions: tuple[int, ...]


class TokenBatch(NamedTuple):
    """The input of one forward pass over C completions. Made by `token_batch`, read by `CompletionLogps` and
    `CompletionRewards`.

    `input_ids` and `position_ids` are [R, T] int64; R is 1 when packed. `attention_mask` [R, T] is 1 on real tokens.
    For each of the N completion tokens, in the order of the completions: `predictors` [N] is the flat position (row *
    T + column) whose hidden state predicts it, `labels` [N] its id, `owners` [N] the number of its completion.
    `ends` [C] is the flat position of the last token of each completion, of its prompt where it has none.
    `segments` describe a packed row and are empty when padded. A named tuple, because ZeRO-3 looks for tensors there.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    predictors: Tensor
    labels: Tensor
    owners: Tensor
    ends: Tensor
    completions: int
    segments: tuple[Segment, ...]

    def to(self, device: torch.device) -> "TokenBatch":
        ids, positions, mask, predictors, labels, owners, ends = (on_device(tensor, device) for tensor in self[:7])
        return TokenBatch(ids, positions, mask, predictors, labels, owners, ends, self.completions, self.segments)


def token_cost(group: Completions, layout: Layout) -> int:
    """Tokens that `group` takes in a packed row; padding is not counted."""
    copies = 1 if layout == "shared" else len(group.completions)
    return len(group.prompt) * copies + sum(map(len, group.completions))


def token_batch(groups: Sequence[Completions], layout: Layout, pad_id: int) -> TokenBatch:
    """One forward pass over all completions of `groups`, numbered group by group."""
    if layout == "shared":
        return _packed(groups)
    alone = [Completions(group.prompt, (completion,)) for group in groups for completion in group.completions]
    return _packed(alone) if layout == "packed" else _padded(alone, pad_id)


def cut(groups: Sequence[Completions], layout: Layout, max_tokens: int) -> list[list[Completions]]:
    """The completions of `groups`, in their order, as pieces of at most `max_tokens` tokens each.

    A prompt is in every piece that has a completion of it. A sequence longer than `max_tokens` is a piece of its own.
    """
    pieces: list[list[Completions]] = []
    cost = max_tokens
    for group in groups:
        held = False
        for completion in group.completions:
            repeated = held and layout == "shared"
            more = len(completion) + (0 if repeated else len(group.prompt))
            if not pieces or cost + more > max_tokens:
                pieces.append([])
                held, cost, more = False, 0, len(group.prompt) + len(completion)
            if held:
                before = pieces[-1].pop()
                pieces[-1].append(Completions(group.prompt, [*before.completions, completion]))
            else:
                pieces[-1].append(Completions(group.prompt, [completion]))
            held, cost = True, cost + more
    return pieces


def _packed(groups: Sequence[Completions]) -> TokenBatch:
    input_ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    lengths: list[int] = []
    ends: list[int] = []
    segments: list[Segment] = []
    for group in groups:
        start, prompt = len(input_ids), len(group.prompt)
        segments.append(Segment(start, prompt, tuple(map(len, group.completions))))
        input_ids += group.prompt
        positions += range(prompt)
        for completion in group.completions:
            first = len(input_ids)
            # The last prompt token predicts the first token of every completion.
            predictors += [start + prompt - 1, *range(first, first + len(completion) - 1)][: len(completion)]
            input_ids += completion
            positions += range(prompt, prompt + len(completion))
            lengths.append(len(completion))
            ends.append(len(input_ids) - 1 if completion else start + prompt - 1)
    row = torch.tensor([input_ids])
    return TokenBatch(
        row,
        torch.tensor([positions]),
        torch.ones_like(row),
        torch.tensor(predictors, dtype=torch.int64),
        _labels(groups),
        _owners(lengths),
        torch.tensor(ends, dtype=torch.int64),
        len(lengths),
        tuple(segments),
    )


def _padded(groups: Sequence[Completions], pad_id: int) -> TokenBatch:
    rows = [[*group.prompt, *group.completions[0]] for group in groups]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    lengths = [len(group.completions[0]) for group in groups]
    ends = [number * width + len(row) - 1 for number, row in enumerate(rows)]
    predictors = chain.from_iterable(range(end - length, end) for end, length in zip(ends, lengths, strict=True))
    return TokenBatch(
        ids,
        torch.arange(width).repeat(len(rows), 1),
        mask,
        torch.tensor(list(predictors), dtype=torch.int64),
        _labels(groups),
        _owners(lengths),
        torch.tensor(ends, dtype=torch.int64),
        len(lengths),
        (),
    )


def _labels(groups: Sequence[Completions]) -> Tensor:
    completions = chain.from_iterable(group.completions for group in groups)
    return torch.tensor(list(chain.from_iterable(completions)), dtype=torch.int64)


def _owners(lengths: Sequence[int]) -> Tensor:
    owners = chain.from_iterable(repeat(number, length) for number, length in enumerate(lengths))
    return torch.tensor(list(owners), dtype=torch.int64)
