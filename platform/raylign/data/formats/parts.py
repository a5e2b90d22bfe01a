"""What a row holds, whatever its format, and the checks that all formats share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raylign.config.base import FLOAT32
from raylign.data.examples import SCORES, Completion
from raylign.prompts.conversations import conversation, conversation_problem, messages_problem, text_problem
from raylign.reading import plain_problem, shown
from raylign.reading.json_text import parse_json
from raylign.records import Message

Cells = Mapping[str, Any]
"""One row: values by column."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
UNPAIRED = ("label", "labels", "kto_tag")
PAIR_CURE = "give an answer that is better than the other, or remove the row"


class BadRow(Exception):
    """A row that cannot be used: what is wrong, the value at fault and the cure. Becomes a `Fault`."""

    def __init__(self, problem: str, value: object, cure: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.value = value
        self.cure = cure


@dataclass(frozen=True, slots=True)
class Parts:
    """An `Example` without its number. `used` are the columns that went into it; the others may become meta.

    `joins`: it is one Example together with adjacent rows of the same prompt that join too. `scale` says what the
    scores are.
    """

    prompt: tuple[Message, ...]
    completions: tuple[Completion, ...]
    ranked: bool
    used: frozenset[str]
    tools: tuple[Mapping[str, Any], ...] = ()
    language: str | None = None
    joins: bool = False
    scale: str = SCORES


@dataclass(frozen=True, slots=True)
class Form:
    """One format. `parse` turns a row into Parts or raises BadRow.

    `columns` are those a row needs, one tuple for each shape that the format comes in. `scales` has the lowest and
    highest value of each attribute that the format rates.
    """

    parse: Callable[[Cells], Parts]
    columns: tuple[tuple[str, ...], ...]
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def filled(value: object) -> bool:
    """Whether an optional cell says anything: neither null nor empty."""
    return not (value is None or value == "" or value == [] or value == {})


def required(row: Cells, column: str) -> Any:
    """The value of a column. Raises BadRow when the row has none."""
    if row.get(column) is None:
        raise BadRow(f"no {column!r}", dict(row), "fill that column or remove the row")
    return row[column]


def text(row: Cells, column: str) -> str:
    """The text of a column. Raises BadRow when it is missing, empty, no string or no valid Unicode."""
    value = required(row, column)
    if not isinstance(value, str):
        raise BadRow(f"{column} is a {type(value).__name__} instead of a string", value, "give a string")
    return checked_text(column, value)


def checked_text(name: str, value: str) -> str:
    """The text itself. Raises BadRow when it is empty or no valid Unicode."""
    problem, cure = text_problem(name, value)
    if problem:
        raise BadRow(problem, value, cure)
    return value


def check_text_only(row: Cells) -> None:
    """Raise BadRow for what an Example cannot hold: media, and verdicts on single answers."""
    for column in MEDIA:
        if filled(row.get(column)):
            raise BadRow(f"has {column}", row[column], "only text is trained on; remove the row or the column")
    for column in UNPAIRED if row.get("chosen") is None else ():
        if isinstance(row.get(column), bool | list):
            cure = "pair a good with a bad answer, or keep the good ones alone without that column"
            raise BadRow(f"a verdict on a single answer ({column})", row[column], cure)


def prompt_of(value: object, system: object = None) -> tuple[Message, ...]:
    """Messages of a string or a list of messages that ends with the one to answer; `system` first if it has none."""
    problem, cure = conversation_problem(value)
    if problem:
        raise BadRow(problem, value, cure)
    return conversation(value, system_of(system))  # type: ignore[arg-type]


def system_of(value: object) -> str | None:
    """The text of a system cell, None for an empty one."""
    if not filled(value):
        return None
    if not isinstance(value, str):
        raise BadRow(f"system is a {type(value).__name__} instead of a string", value, "give a string")
    return checked_text("system", value)


def turns_of(name: str, value: object) -> tuple[Message, ...]:
    """Checked messages of a list, whoever speaks last; `name` says which in an error."""
    problem, cure = messages_problem(value)
    if problem:
        raise BadRow(f"{name}: {problem}", value, cure)
    return conversation(value, None)  # type: ignore[arg-type]


def answer_of(name: str, value: object) -> tuple[Message, ...]:
    """Messages of one answer, given as a string, one message or a list of messages."""
    if isinstance(value, str):
        return ({"role": "assistant", "content": checked_text(name, value)},)
    messages = turns_of(name, [value] if isinstance(value, dict) else value)
    check_answer(name, messages)
    return messages


def check_answer(name: str, messages: Sequence[Message]) -> None:
    """Raise BadRow unless the assistant begins and ends an answer, with at most tools in between."""
    for message in (messages[0], messages[-1]):
        if message["role"] != "assistant":
            cure = "give the assistant's answer alone, without the prompt"
            raise BadRow(f"{name} begins or ends with {message['role']}", list(messages), cure)
    others = {message["role"] for message in messages} - {"assistant", "tool"}
    if others:
        raise BadRow(f"{name} has messages from {', '.join(sorted(others))}", list(messages), "give one answer")


def split_demonstration(name: str, messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(prompt, answer): everything before the last message, and that message, which the assistant must have written."""
    if messages[-1]["role"] != "assistant":
        cure = "end with the assistant's answer"
        raise BadRow(f"{name} ends with {messages[-1]['role']}", list(messages), cure)
    return prompt_of(list(messages[:-1])), messages[-1:]


def pair(
    chosen: tuple[Message, ...],
    rejected: tuple[Message, ...],
    scores: tuple[float | None, float | None] = (None, None),
    ratings: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {}),
) -> tuple[Completion, Completion]:
    """Two answers, the better first. Raises BadRow when they are the same or the scores say the opposite."""
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same", list(chosen), PAIR_CURE)
    better, worse = scores
    if better is not None and worse is not None and better < worse:
        raise BadRow(f"chosen scores {better:g}, below rejected with {worse:g}", (better, worse), PAIR_CURE)
    return Completion(chosen, better, ratings[0]), Completion(rejected, worse, ratings[1])


def number(name: str, value: object) -> float:
    """A number that a float32 holds, also when it is written as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise BadRow(f"{name} is no number", value, "give a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{name} is a {type(value).__name__} instead of a number", value, "give a number")
    if not abs(value) <= FLOAT32[1]:
        raise BadRow(f"{name} is {shown(value)}", value, f"give a finite number of at most {FLOAT32[1]:g}")
    return float(value)


def rating(name: str, value: object, scale: tuple[float, float]) -> float:
    """A number on its scale (lowest, highest)."""
    found = number(name, value)
    low, high = scale
    if not low <= found <= high:
        raise BadRow(f"{name} is {found:g}, outside {low:g} to {high:g}", value, "correct it or name the right format")
    return found


def tools_of(value: object) -> tuple[Mapping[str, Any], ...]:
    """Tool schemas of a list or of JSON text; a bare function is wrapped as chat templates expect it."""
    if not filled(value):
        return ()
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise BadRow(f"tools is not JSON ({error})", value, "give a list of tool schemas") from error
    schemas = [value] if isinstance(value, dict) else value
    if not isinstance(schemas, list) or not all(isinstance(schema, dict) for schema in schemas):
        raise BadRow("tools is no list of objects", value, "give a list of tool schemas")
    if not all(_is_function(schema.get("function", schema)) for schema in schemas):
        raise BadRow("tools has a function without a name in text", value, 'give [{"function": {"name": ...}}]')
    problem, cure = plain_problem("tools", schemas)
    if problem:
        raise BadRow(problem, value, cure)
    return tuple(_wrapped(schema) for schema in schemas)


def used(row: Cells, columns: Iterable[str]) -> frozenset[str]:
    """Those of `columns` that the row has."""
    return frozenset(columns) & row.keys()


def _is_function(schema: object) -> bool:
    return isinstance(schema, dict) and isinstance(schema.get("name", ""), str)


def _wrapped(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "function", "function": schema} if "name" in schema and "function" not in schema else schema
