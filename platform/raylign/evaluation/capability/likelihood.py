"""Texts and questions in tokens, and what their log-probs say; all as lm-eval has it, so that figures compare.

Source: EleutherAI's lm-evaluation-harness, `TemplateLM._encode_pair` and `loglikelihood_rolling`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from raylign.chunks import chunks
from raylign.errors import DataError, TrainerError
from raylign.evaluation.capability.measures import ItemResult
from raylign.evaluation.capability.tasks import Item, Passage, Question, Task
from raylign.records import Completions

Logps = Callable[[Sequence[Completions]], list[list[float]]]
"""Summed log-probs (nats) of the completions of each row, as `Trainers.policy_logps` gives them."""
_ROWS_PER_CALL = 64


@dataclass(frozen=True, slots=True)
class Encoder:
    """Texts as the model reads them. A sequence has at most `window` tokens, which the option `option` sets.

    A BOS token begins a context where the tokenizer itself puts one before texts, as the model was trained then.
    """

    tokenizer: PreTrainedTokenizerBase
    window: int
    option: str
    begin: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        bos = self.tokenizer.bos_token_id
        first = list(self.tokenizer("a").input_ids)[:1]
        object.__setattr__(self, "begin", tuple(first) if bos is not None and first == [bos] else ())

    @property
    def prefix(self) -> int:
        """What stands before a text that nothing stands before: BOS, or EOS where there is none."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return int(eos if bos is None else bos)

    def ids(self, text: str) -> list[int]:
        """The tokens of `text` alone."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both: those of the whole text that come after as many as the context has by itself.

        A token that straddles the boundary is the continuation's where the context alone has no more tokens than come
        before it. Spaces that end the context count as the continuation's. Without a context `prefix` stands for it.
        """
        if not (kept := context.rstrip()):
            return [self.prefix], self.ids(context + continuation)
        whole, own = self.ids(context + continuation), self.ids(kept)
        return [*self.begin, *own], whole[len(own) :]

    def windows(self, text: str) -> list[Completions]:
        """Every token of `text` once, predicted from those before it within its window.

        A window begins with the last token of the one before, and the last one as early as it can.
        """
        tokens, most = [self.prefix, *self.ids(text)], self.window - 1
        found = []
        for first in range(1, len(tokens), most):
            end = min(first + most, len(tokens))
            start = max(0, end - self.window)
            found.append(Completions(tuple(tokens[start:first]), (tuple(tokens[first:end]),)))
        return found


class Measured(Protocol):
    """A task that a policy can be measured on."""

    @property
    def name(self) -> str:
        """What metrics call it."""
        ...

    @property
    def digest(self) -> str:
        """sha256 (hex) of what is asked."""
        ...

    @property
    def items(self) -> int:
        """How many texts or questions it has."""
        ...

    @property
    def rows(self) -> int:
        """How many rows it asks log-probs of."""
        ...

    def measure(self, logps: Logps, advance: Callable[[int], None]) -> tuple[ItemResult, ...]:
        """What the policy behind `logps` says of every item; `advance(n)` is called as n more rows have log-probs.

        Raises TrainerError when a log-prob is not finite.
        """
        ...


@dataclass(frozen=True, slots=True)
class EncodedTask:
    """A task in tokens, `encoded[i]` being the rows of item i. Made by `encode`."""

    task: Task
    encoded: tuple[tuple[Completions, ...], ...]

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def digest(self) -> str:
        return self.task.digest

    @property
    def items(self) -> int:
        return len(self.task.items)

    @property
    def rows(self) -> int:
        return sum(map(len, self.encoded))

    def measure(self, logps: Logps, advance: Callable[[int], None]) -> tuple[ItemResult, ...]:
        """See `Measured`."""
        found = ask(f"task {self.name}", [row for rows in self.encoded for row in rows], logps, advance)
        values = iter(found)
        return tuple(
            _result(item, rows, [next(values) for _ in rows])
            for item, rows in zip(self.task.items, self.encoded, strict=True)
        )


def encode(task: Task, encoder: Encoder) -> EncodedTask:
    """Raises DataError where a question is longer than the window, or an answer has no token of its own."""
    return EncodedTask(task, tuple(_rows(task.name, item, encoder) for item in task.items))


def ask(what: str, rows: Sequence[Completions], logps: Logps, advance: Callable[[int], None]) -> list[list[float]]:
    """Log-probs of the completions of `rows`, some rows at a time. Raises TrainerError when one is not finite."""
    found: list[list[float]] = []
    for part in chunks(rows, _ROWS_PER_CALL):
        found += logps(part)
        advance(len(part))
    if not all(math.isfinite(logp) for of_row in found for logp in of_row):
        raise TrainerError(
            f"{what}: the policy gives log-probs that are not finite; go back to an earlier checkpoint, and lower "
            "trainer.learning_rate"
        )
    return found


def _rows(task: str, item: Item, encoder: Encoder) -> tuple[Completions, ...]:
    where = f"task {task}, item {item.id}"
    match item:
        case Passage():
            if not (windows := encoder.windows(item.text)):
                raise DataError(f"{where}: the text has no tokens; leave it out")
            return tuple(windows)
        case Question():
            pairs = [encoder.pair(item.context, f" {choice}") for choice in item.choices]
            for choice, (context, own) in zip(item.choices, pairs, strict=True):
                if not own:
                    raise DataError(f"{where}: choice {choice!r} has no token of its own; write it otherwise")
                if (length := len(context) + len(own)) > encoder.window:
                    raise DataError(
                        f"{where}: {length} tokens with choice {choice[:40]!r}, more than {encoder.option}="
                        f"{encoder.window}; shorten it, or raise {encoder.option}"
                    )
            return (Completions(tuple(pairs[0][0]), tuple(tuple(own) for _, own in pairs)),)


def _result(item: Item, rows: Sequence[Completions], logps: Sequence[Sequence[float]]) -> ItemResult:
    match item:
        case Passage():
            tokens = sum(len(row.completions[0]) for row in rows)
            total = math.fsum(of_row[0] for of_row in logps)
            return ItemResult(item.id, (total,), (len(item.text.encode()),), tokens)
        case Question():
            sizes = tuple(len(choice.encode()) for choice in item.choices)
            tokens = sum(map(len, rows[0].completions))
            return ItemResult(item.id, tuple(logps[0]), sizes, tokens, item.answer)
