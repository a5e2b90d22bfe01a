"""Prompt sets as their authors publish them, in rows copied from theirs."""

import json
from pathlib import Path
from typing import Any

import pytest

from raylign.config.blocks import PromptsBlock
from raylign.config.evaluate import AnswersSideBlock, EvaluatedPromptsBlock
from raylign.config.scoring.blocks import IFEVAL
from raylign.errors import PromptError
from raylign.models import load_tokenizer, resolve_model
from raylign.prompts import load_all
from raylign.prompts.answers import given_answers
from raylign.prompts.published import as_published
from raylign.prompts.sources import read_source
from raylign.records import Prompt

ALPACA: dict[str, Any] = {
    "instruction": "What are the names of some famous actors that started their careers on Broadway?",
    "output": "Some famous actors that started their careers on Broadway include: Hugh Jackman, Meryl Streep.",
    "generator": "text_davinci_003",
    "dataset": "helpful_base",
}
ARENA: dict[str, Any] = {
    "uid": "2edbb5f36f5b42be",
    "category": "hard_prompt",
    "subcategory": "coding",
    "prompt": "Write me a zig program that solves the following problem from advent of code",
}
OLD_ARENA: dict[str, Any] = {
    "question_id": "328c149ed45a41c0b9d6f14659e63599",
    "category": "arena-hard-v0.1",
    "cluster": "ABC Sequence Puzzles & Groups",
    "turns": [{"content": "Use ABC notation to write a melody in the style of a folk tune."}],
}
IFEVAL_ROW: dict[str, Any] = {
    "key": 1001,
    "prompt": "I am planning a trip to Japan. You are not allowed to use any commas in your response.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{"num_words": None}, {"relation": "at least", "num_words": 300}],
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [dict(row.cells) for row in read_source(PromptsBlock(source=str(path))).train.rows]


def written(path: Path, *lines: Any) -> Path:
    text = json.dumps(list(lines)) if path.suffix == ".json" else "\n".join(map(json.dumps, lines))
    path.write_text(text)
    return path


def test_alpaca_eval_is_a_json_list(tmp_path: Path) -> None:
    (row,) = rows(written(tmp_path / "alpaca_eval.json", ALPACA))
    assert row == {"prompt": ALPACA["instruction"]} | {n: c for n, c in ALPACA.items() if n != "instruction"}


def test_arena_hard_has_its_prompts_in_one_place_or_the_other(tmp_path: Path) -> None:
    assert rows(written(tmp_path / "v2.jsonl", ARENA)) == [ARENA]
    (row,) = rows(written(tmp_path / "v01.jsonl", OLD_ARENA))
    assert row["prompt"].startswith("Use ABC notation") and row["cluster"] == "ABC Sequence Puzzles & Groups"
    assert "turns" not in row


def test_ifeval_keeps_its_instructions_as_one_cell(tmp_path: Path) -> None:
    """Cells of lists are no part of a prompt's `meta`; the JSON of them is."""
    (row,) = rows(written(tmp_path / "input_data.jsonl", IFEVAL_ROW))
    assert json.loads(row[IFEVAL]) == [
        ["punctuation:no_comma", {}],
        ["length_constraints:number_words", {"relation": "at least", "num_words": 300}],
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x", "instruction": "y", "output": "z", "generator": "g"},
        {"instruction": "alpaca, but no AlpacaEval", "input": "", "output": "z"},
        {"turns": [{"content": "one"}, {"content": "two"}]},
        {"turns": "none"},
        {"prompt": "x"},
    ],
)
def test_other_rows_stay_as_they_are(row: dict[str, Any]) -> None:
    assert as_published(row, "prompt") == row


def test_instructions_without_their_arguments_are_none() -> None:
    assert as_published({"instruction_id_list": ["a"], "kwargs": []}, "prompt")[IFEVAL] is None
    assert as_published({"instruction_id_list": ["a"], "kwargs": [3]}, "prompt")[IFEVAL] is None


def test_all_prompts_are_taken_to_evaluate_on_with_what_their_rows_say(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model("embedded:smollm2-135m"))
    path = written(tmp_path / "set.json", ALPACA, {**ALPACA, "instruction": "Why?", "output": "So."}, ALPACA)
    found = load_all(EvaluatedPromptsBlock(source=str(path)).rows, tokenizer, 200)
    assert found.train == () and [prompt.id for prompt in found.held_out] == ["h000000", "h000001"]
    assert found.held_out[1].meta["dataset"] == "helpful_base"
    assert len(load_all(PromptsBlock(source=str(path)), tokenizer, 200, most=1).held_out) == 1
    own = given_answers(AnswersSideBlock(), found.held_out, tokenizer)
    assert [(one.prompt_id, one.text) for one in own] == [("h000000", ALPACA["output"]), ("h000001", "So.")]
    assert tokenizer.decode(list(own[1].token_ids)) == "So."
    other = written(tmp_path / "other.json", {**ALPACA, "instruction": "Why?", "output": "Why not."})
    with pytest.raises(PromptError, match=r"1 of 2 prompts have no answer in column 'output' of .*first is h000000"):
        given_answers(AnswersSideBlock(source=other), found.held_out, tokenizer)
    (answer,) = given_answers(AnswersSideBlock(source=other), found.held_out[1:], tokenizer)
    assert answer.text == "Why not."


ARENA_ANSWER: dict[str, Any] = {
    "uid": ARENA["uid"],
    "ans_id": "eCgoSmOXT3mUkgkMAmqPwA",
    "model": "o3-mini-2025-01-31",
    "messages": [
        {"role": "user", "content": ARENA["prompt"]},
        {"role": "assistant", "content": {"answer": "Below is one way to do it."}},
    ],
    "tstamp": 1744943384.5,
    "metadata": {"token_len": 7, "header_count": {"h1": 0}},
}
OLD_ARENA_ANSWER: dict[str, Any] = {
    "question_id": OLD_ARENA["question_id"],
    "answer_id": "8KBbeNuzLtnvDTvpgLLXPg",
    "model_id": "gpt-4-0314",
    "choices": [{"index": 0, "turns": [{"content": "X:1\nT:Untitled Folk Tune", "token_len": 12}]}],
    "tstamp": 1698958213.0,
}


@pytest.mark.parametrize(
    ("question", "answer", "text"),
    [
        (ARENA, ARENA_ANSWER, "Below is one way to do it."),
        (OLD_ARENA, OLD_ARENA_ANSWER, "X:1\nT:Untitled Folk Tune"),
        ({**ARENA, "uid": "of another copy"}, ARENA_ANSWER, "Below is one way to do it."),
        (ALPACA, {**ALPACA, "output": "Hugh Jackman.", "generator": "gpt4"}, "Hugh Jackman."),
    ],
)
def test_published_answers_are_found_by_their_question(
    question: dict[str, Any], answer: dict[str, Any], text: str, tmp_path: Path
) -> None:
    """A question in another place than its answer, and one more answer that nobody asks for."""
    tokenizer = load_tokenizer(resolve_model("embedded:smollm2-135m"))
    asked = load_all(PromptsBlock(source=str(written(tmp_path / "question.jsonl", question))), tokenizer, 200).held_out
    other = {**answer, "uid": "x", "question_id": "y", "instruction": "Else?", "messages": [], "choices": []}
    path = written(tmp_path / "answers.jsonl", other, answer)
    (found,) = given_answers(AnswersSideBlock(source=path), asked, tokenizer)
    assert (found.prompt_id, found.text) == (asked[0].id, text)


def test_several_answers_to_one_question_are_no_answer() -> None:
    twice = {**OLD_ARENA_ANSWER, "choices": OLD_ARENA_ANSWER["choices"] * 2}
    assert as_published(twice, "prompt") == twice
    turns = {**ARENA_ANSWER, "messages": ARENA_ANSWER["messages"] * 2}
    assert as_published(turns, "prompt") == turns


def test_answers_of_a_row_without_any_are_refused() -> None:
    prompt = Prompt("h1", ({"role": "user", "content": "?"},), (1,), {"output": None})
    tokenizer: Any = None
    with pytest.raises(PromptError, match="in column 'output' of their own rows"):
        given_answers(AnswersSideBlock(), [prompt], tokenizer)
