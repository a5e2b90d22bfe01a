"""From an example to the texts that the model's chat template makes of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from raylign.config.offline import Rows
from raylign.data.answers import answers, shown
from raylign.data.examples import Completion, Example
from raylign.models.chat_template import TEMPLATE_ERRORS
from raylign.prompts.conversations import conversation
from raylign.prompts.tables import Fault
from raylign.records import Message

ANOTHER = "name another template in model.chat_template"
_SHOWN = 24


@dataclass(frozen=True, slots=True)
class Templated:
    """An example as text. `wholes` has the prompt with each of `completions`, and begins with `prompt`."""

    example: Example
    messages: tuple[Message, ...]
    completions: tuple[Completion, ...]
    prompt: str
    """Ends with the generation prompt."""
    wholes: tuple[str, ...]


def templated(
    example: Example, tokenizer: PreTrainedTokenizerBase, rows: Rows, system: str | None, ends: Sequence[str]
) -> Templated | Fault:
    """The texts of the answers that `rows` asks for.

    A Fault where there are none; where the template refuses the conversation, leaves its tools out, or writes a prompt
    in another way once an answer follows, so that training would see another prompt than generation does; and where an
    answer holds one of `ends`, the tokens at which generation stops, in its own text.
    """
    completions = answers(example, rows)
    if isinstance(completions, Fault):
        return completions
    messages = conversation([*example.prompt], system)
    try:
        prompt = _text(tokenizer, messages, example.tools, generation=True)
        wholes = tuple(
            _text(tokenizer, (*messages, *completion.messages), example.tools, generation=False)
            for completion in completions
        )
    except TEMPLATE_ERRORS as error:
        # Templates add texts up: what is not there, such as the content of a call, is a TypeError.
        problem, cure = f"refused by the chat template ({error})", f"order roles as the model expects, or {ANOTHER}"
        return Fault(example.number, problem, shown(example), cure)
    one = Templated(example, messages, completions, prompt, wholes)
    problem, cure = _problem(one, ends)
    return Fault(example.number, problem, shown(example), cure) if problem else one


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


def _problem(one: Templated, ends: Sequence[str]) -> tuple[str, str]:
    """(problem, cure) of texts that cannot be trained on; two empty strings if they can."""
    for whole, completion in zip(one.wholes, one.completions, strict=True):
        if not whole.startswith(one.prompt):
            return _parted(one.prompt, whole), f"{ANOTHER} that writes a prompt alike with and without its answer"
        if name := next((name for name in _called((*one.messages, *completion.messages)) if name not in whole), ""):
            return f"the chat template leaves out the call of {name}", f"{ANOTHER} that writes tool calls"
        said = [str(message.get("content") or "") for message in completion.messages]
        if end := next((end for end in ends for text in said if end in text), ""):
            return f"the answer holds {end}, at which generation stops, in its text", "take it out of the answer"
    if name := next((name for name in _offered(one.example.tools) if name not in one.prompt), ""):
        return f"the chat template leaves out the tool {name}", f"{ANOTHER} that writes tools, or remove them"
    return "", ""


def _parted(prompt: str, whole: str) -> str:
    at = len(commonprefix([prompt, whole]))
    alone, answered = (text[max(0, at - _SHOWN) : at + _SHOWN] for text in (prompt, whole))
    return f"the chat template writes {alone!r} in the prompt alone, but {answered!r} once an answer follows"


def _called(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        yield from _offered(message.get("tool_calls") or ())


def _offered(functions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Names of functions, bare or wrapped as chat templates expect them."""
    for function in functions:
        name = function.get("function", function).get("name")
        if name:
            yield name
