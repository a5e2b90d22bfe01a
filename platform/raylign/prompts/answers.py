"""Answers that somebody has given to a set of prompts, as candidates."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from raylign.config.blocks import PromptsBlock
from raylign.config.evaluate import AnswersSideBlock
from raylign.errors import PromptError
from raylign.prompts.conversations import conversation, conversation_problem
from raylign.prompts.published import QUESTION_IDS
from raylign.prompts.sources import read_source
from raylign.records import Candidate, Prompt
from raylign.report.text import one_line

_PROMPT = "prompt"
_Key = tuple[str, str]
"""A column, and what a row says there: the prompt, or an id of it."""
_SHOWN = 60


def given_answers(
    block: AnswersSideBlock, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> list[Candidate]:
    """One candidate for each prompt, in order, of version 0; its tokens are those of `tokenizer`.

    Rows of `block.source` are found by the id of Arena-Hard's question, else by their prompt's last message; without a
    source the answer is in the prompt's own row. Raises PromptError for prompts without an answer.
    """
    known = {} if block.source is None else _by_question(block)
    texts = [prompt.meta.get(block.column) if block.source is None else _found(known, prompt) for prompt in prompts]
    if missing := [prompt for prompt, text in zip(prompts, texts, strict=True) if not isinstance(text, str)]:
        where = f"in column {block.column!r} of " + ("their own rows" if block.source is None else str(block.source))
        raise PromptError(
            f"{len(missing)} of {len(prompts)} prompts have no answer {where}; the first is {missing[0].id}: "
            f"{one_line(_question(missing[0].messages), _SHOWN)!r}; give answers to the same prompts, or name their "
            "column"
        )
    return [
        Candidate(prompt.id, 0, tuple(tokenizer.encode(text, add_special_tokens=False)), (), text, "stop", 0, 0)
        for prompt, text in zip(prompts, map(str, texts), strict=True)
    ]


def _by_question(block: AnswersSideBlock) -> Mapping[_Key, Any]:
    table = read_source(PromptsBlock(source=str(block.source), column=_PROMPT)).train
    table.require(block.column)
    found: dict[_Key, Any] = {}
    for row in table.rows:
        asked, answer = row.cells.get(_PROMPT), row.cells.get(block.column)
        if not conversation_problem(asked)[0] and isinstance(asked, str | list):
            found.setdefault((_PROMPT, _question(conversation(asked, None))), answer)
        for key in _ids(row.cells):
            found.setdefault(key, answer)
    return found


def _found(known: Mapping[_Key, Any], prompt: Prompt) -> Any:
    keys = (*_ids(prompt.meta), (_PROMPT, _question(prompt.messages)))
    return next((known[key] for key in keys if key in known), None)


def _ids(cells: Mapping[str, Any]) -> list[_Key]:
    return [(name, own) for name in QUESTION_IDS if isinstance(own := cells.get(name), str)]


def _question(messages: Sequence[Mapping[str, Any]]) -> str:
    return str(messages[-1].get("content", "")) if messages else ""
