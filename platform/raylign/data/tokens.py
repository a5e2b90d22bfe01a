"""From conversations to token ids, by the model's chat template."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from raylign.config.offline import Rows
from raylign.data.answers import answers
from raylign.data.examples import Completion, Example
from raylign.prompts.tables import Fault
from raylign.records import Message

_BATCH = 256
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Tokenized:
    """An example in tokens; `ids` runs parallel to `completions`. `prompt` is what all of them follow.

    `cut` counts the tokens at the end of the templated prompt that are no part of a templated conversation.
    """

    example: Example
    messages: tuple[Message, ...]
    completions: tuple[Completion, ...]
    prompt: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    cut: int


@dataclass(frozen=True, slots=True)
class _Templated:
    example: Example
    messages: tuple[Message, ...]
    completions: tuple[Completion, ...]
    texts: tuple[str, ...]
    """The prompt with its generation prompt, then the prompt with each completion."""


def tokenized(
    examples: Iterator[Example | Fault], tokenizer: PreTrainedTokenizerBase, rows: Rows, system: str | None
) -> Iterator[Tokenized | Fault]:
    """Each example in tokens, in order; a Fault where it has no answer of the kind, or the template refuses it.

    As in TRL, prompt and prompt with completion are templated and tokenised, and the completion starts where their
    tokens diverge: at the generation prompt's end, unless the template writes the prompt alone in another way or a
    token reaches over the boundary. A completion ends with its last EOS token: what the template writes behind it (the
    newline of ChatML) is never sampled, because generation stops there. An answer whose template writes no EOS gets
    none. `system` goes before conversations that have no system message.
    """
    for batch in _batches(examples, _BATCH):
        templated = [_templated(example, tokenizer, rows, system) for example in batch]
        texts = [text for one in templated if isinstance(one, _Templated) for text in one.texts]
        ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        for one in templated:
            yield one if isinstance(one, Fault) else _split(one, list(islice(ids, len(one.texts))), tokenizer)


def _batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while batch := list(islice(items, size)):
        yield batch


def _templated(
    example: Example | Fault, tokenizer: PreTrainedTokenizerBase, rows: Rows, system: str | None
) -> _Templated | Fault:
    if isinstance(example, Fault):
        return example
    completions = answers(example, rows)
    if isinstance(completions, Fault):
        return completions
    messages = _with_system(example.prompt, system)
    try:
        texts = (
            _text(tokenizer, messages, example.tools, generation=True),
            *(_text(tokenizer, (*messages, *c.messages), example.tools, generation=False) for c in completions),
        )
    except TemplateError as error:
        last = messages[-1].get("content")
        return Fault(
            example.number, f"refused by the chat template ({error})", last, "order roles as the model expects"
        )
    return _Templated(example, messages, completions, texts)


def _with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    if system is None or any(message["role"] == "system" for message in messages):
        return messages
    return ({"role": "system", "content": system}, *messages)


def _text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    *,
    generation: bool,
) -> str:
    turns: list[Any] = [dict(message) for message in messages]
    functions: list[Any] = [dict(tool) for tool in tools]
    text = tokenizer.apply_chat_template(
        turns, tools=functions or None, add_generation_prompt=generation, tokenize=False
    )
    assert isinstance(text, str)
    return text


def _split(one: _Templated, ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> Tokenized:
    prompt, wholes = ids[0], ids[1:]
    start = min(_common_prefix(prompt, whole) for whole in wholes)
    completions = tuple(_ended(tuple(whole[start:]), tokenizer) for whole in wholes)
    return Tokenized(
        one.example, one.messages, one.completions, tuple(prompt[:start]), completions, len(prompt) - start
    )


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _ended(ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Without white space behind the last EOS token."""
    ends = [place for place, token in enumerate(ids) if token == tokenizer.eos_token_id]
    if not ends or str(tokenizer.decode(list(ids[ends[-1] + 1 :]))).strip():
        return ids
    return ids[: ends[-1] + 1]
