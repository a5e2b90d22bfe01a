"""What capability is measured on: texts to read and questions to answer, raylign's own or a user's."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from raylign.config.capability import EMBEDDED_TASKS, task_name
from raylign.config.data import SourceBlock
from raylign.data.rows import open_rows
from raylign.errors import DataError
from raylign.evaluation.capability.arithmetic import arithmetic_sums
from raylign.prompts.tables import Fault, Row
from raylign.reading.json_text import all_arrays

_FILES = {"perplexity": "held_out_texts.json", "multiple_choice": "multiple_choice.json"}
_OPTIONS = "evaluation.capability.tasks"
_KINDS = "give rows with text, or rows with question, choices and answer"


@dataclass(frozen=True, slots=True)
class Question:
    """The model reads `context` and is asked how likely each of `choices` is to follow; `answer` is the right one."""

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Passage:
    """A text to read from its beginning."""

    id: str
    text: str


Item = Question | Passage


@dataclass(frozen=True, slots=True)
class Task:
    """Items of one kind. Made by `load_task`; `name` is what metrics call it."""

    name: str
    items: tuple[Item, ...]

    @property
    def digest(self) -> str:
        """sha256 (hex) of the items."""
        return hashlib.sha256(json.dumps([asdict(item) for item in self.items]).encode()).hexdigest()


def load_task(task: str) -> Task:
    """The items of a task of raylign's, or of a user's file. Raises DataError, naming the row and the cure."""
    if task == "arithmetic":
        sums = enumerate(arithmetic_sums())
        return Task(task, tuple(Question(str(number), asked(s.text), s.choices, s.answer) for number, s in sums))
    if task in EMBEDDED_TASKS:
        with resources.files("raylign.prompts").joinpath(_FILES[task]).open("rb") as file:
            rows = [Row(number, cells) for number, cells in enumerate(all_arrays(file))]
        return Task(task, _items(task, "row", rows))
    stream = open_rows(SourceBlock(source=task))
    return Task(task_name(task), _items(stream.where, stream.unit, stream))


def asked(question: str) -> str:
    """A question as the model reads it: the form of lm-eval's ARC and SciQ, without a chat template."""
    return f"Question: {question}\nAnswer:"


def _items(where: str, unit: str, rows: Iterable[Row | Fault]) -> tuple[Item, ...]:
    items: list[Item] = []
    for row in rows:
        at = f"{where} {unit} {row.number}"
        if isinstance(row, Fault):
            raise DataError(f"{at}: {row.problem}; {row.cure} ({_OPTIONS})")
        item = _item(at, str(row.cells.get("id", row.number)), row.cells)
        if items and type(item) is not type(items[0]):
            raise DataError(f"{where}: texts and questions in one file; put them into two ({_OPTIONS})")
        items.append(item)
    if not items:
        raise DataError(f"{where}: no rows; {_KINDS} ({_OPTIONS})")
    known: set[str] = set()
    for item in items:
        if item.id in known:
            raise DataError(f"{where}: two rows have the id {item.id!r}; give each its own ({_OPTIONS})")
        known.add(item.id)
    return tuple(items)


def _item(at: str, own_id: str, cells: Mapping[str, Any]) -> Item:
    if "question" in cells:
        return _question(at, own_id, cells)
    text = cells.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{at}: neither a text nor a question; {_KINDS} ({_OPTIONS})")
    return Passage(own_id, text)


def _question(at: str, own_id: str, cells: Mapping[str, Any]) -> Question:
    question, choices, answer = cells["question"], cells.get("choices"), cells.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{at}: question is empty, or no text; write one ({_OPTIONS})")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f"{at}: choices is no list of texts; give the possible answers ({_OPTIONS})")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise DataError(
            f"{at}: {len(choices)} choices, {len(set(choices))} of them apart; give at least 2 ({_OPTIONS})"
        )
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(
            f"{at}: answer={answer!r} is no place in {len(choices)} choices; give one from 0 to {len(choices) - 1} "
            f"({_OPTIONS})"
        )
    return Question(own_id, asked(question), tuple(choices), answer)
