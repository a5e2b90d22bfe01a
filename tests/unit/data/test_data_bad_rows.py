"""Rows that cannot be used: each is named with its number, the reason and a cure, and the rows around it are kept."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from raylign.config.data import Format, SourceBlock
from raylign.data.examples import Example
from raylign.data.rows import read_examples
from raylign.prompts.tables import Fault

U = {"role": "user", "content": "a"}
A = {"role": "assistant", "content": "b"}
B = {"role": "assistant", "content": "c"}
TRL = {"prompt": "a", "chosen": "b", "rejected": "c"}
SHARE = {
    "conversations": [{"from": "human", "value": "a"}],
    "chosen": {"from": "gpt", "value": "b"},
    "rejected": {"from": "gpt", "value": "c"},
}
ALPACA = {"instruction": "a", "chosen": "b", "rejected": "c"}
HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
RATED = {"prompt": "a", "response": "b", "helpfulness": 3, "correctness": 3}
STRENGTH = {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 1}
ULTRA = {"instruction": "a", "completions": [{"response": "b", "annotations": {"honesty": {"Rating": "3"}}}]}
ULTRA_ZH = {"instruction": "天", "chosen_response": "b", "rejected_response": "c", "chosen_rating": {"honesty": "3"}}


def completion(**changes: Any) -> dict[str, Any]:
    return {"instruction": "a", "completions": [{"response": "b", "annotations": {}, "overall_score": 3} | changes]}


CASES: list[tuple[Format, dict[str, Any], dict[str, Any], str]] = [
    ("trl", TRL, TRL | {"rejected": None}, "no 'rejected'"),
    ("trl", TRL, TRL | {"chosen": " "}, "chosen is empty"),
    ("trl", TRL, TRL | {"prompt": ""}, "the prompt is empty"),
    ("trl", TRL, TRL | {"chosen": "half \ud83d"}, "chosen has half a surrogate pair at character 5"),
    ("trl", TRL, TRL | {"chosen": 7, "rejected": 8}, "chosen: int instead of a string or a list of messages"),
    ("trl", TRL, TRL | {"chosen": [A]}, "chosen and rejected are of different kinds: list and str"),
    ("trl", TRL, TRL | {"rejected": "b"}, "chosen and rejected are the same"),
    ("trl", TRL, TRL | {"score_chosen": 1, "score_rejected": 2}, "chosen scores 1, below rejected with 2"),
    ("trl", TRL, TRL | {"score_chosen": 1}, "score_chosen without its counterpart"),
    ("trl", TRL, TRL | {"margin": "big"}, "margin is no number"),
    ("trl", TRL, TRL | {"margin": -1}, "chosen scores -1, below rejected with 0"),
    ("trl", TRL, TRL | {"tools": "[{"}, "tools is not JSON"),
    ("trl", TRL, TRL | {"tools": ["x"]}, "tools is no list of objects"),
    ("trl", TRL, TRL | {"images": ["x.png"]}, "has images"),
    ("trl", TRL, {"prompt": [U], "chosen": [U, A], "rejected": [U, B]}, "chosen begins or ends with user"),
    ("trl", TRL, {"prompt": [U, A], "chosen": [A], "rejected": [B]}, "the last message is from assistant"),
    ("trl", TRL, {"chosen": [U, A], "rejected": [{**U, "content": "x"}, B]}, "chosen and rejected share no prompt"),
    ("trl", TRL, {"chosen": [U, A, U, A], "rejected": [U, B, U, B]}, "differ before the last answer"),
    ("trl", TRL, {"chosen": [U, A], "rejected": [U]}, "rejected has no answer of its own"),
    ("trl", TRL, {"chosen": [U, A], "rejected": [U, A]}, "chosen and rejected are the same"),
    ("trl", TRL, {"chosen": "xyz", "rejected": "abc"}, "chosen and rejected share no prompt"),
    ("trl", TRL, {"chosen": "abc", "rejected": "abcd"}, "chosen is empty"),
    ("trl", TRL, {"messages": [A]}, "a conversation without messages"),
    ("trl", TRL, {"messages": [A, U]}, "messages ends with user"),
    ("trl", TRL, {"messages": [U, {"role": "assistant", "content": None}]}, "message 1 has no content"),
    ("trl", TRL, {"messages": [U, {**A, "tool_calls": [{}]}]}, "tool_calls of message 1 name no function"),
    ("trl", TRL, {"messages": [{**U, "tool_calls": [{"name": "f"}]}, A]}, "message 0 from user has tool_calls"),
    ("trl", TRL, {"messages": [U, {**A, "content": ["b"]}]}, "content of message 1 is a list"),
    ("trl", TRL, {"prompt": "a", "completion": "b", "label": False}, r"a verdict on a single answer \(label\)"),
    ("trl", TRL, {"prompt": "a", "completions": []}, "completions is no list of answers"),
    ("trl", TRL, {"prompt": "a", "completions": ["b"], "scores": [1, 2]}, "scores is no list of 1 numbers"),
    ("trl", TRL, {"prompt": "a", "completions": ["b"], "scores": [float("nan")]}, "score 0 is nan"),
    ("trl", TRL, {"prompt": "a", "completions": ["b"], "scores": [True]}, "score 0 is a bool"),
    ("sharegpt", SHARE, SHARE | {"rejected": None}, "no 'rejected'"),
    ("sharegpt", SHARE, SHARE | {"conversations": "a"}, "conversations is a str instead of a list"),
    ("sharegpt", SHARE, SHARE | {"conversations": ["a"]}, "message 0 is a str"),
    (
        "sharegpt",
        SHARE,
        SHARE | {"conversations": [{"from": "bard", "value": "a"}]},
        "message 0 has unknown role 'bard'",
    ),
    ("sharegpt", SHARE, SHARE | {"conversations": [{"from": "human"}]}, "message 0 has no content"),
    ("sharegpt", SHARE, SHARE | {"conversations": [{"from": "gpt", "value": "a"}]}, "last message is from assistant"),
    ("sharegpt", SHARE, SHARE | {"chosen": {"from": "human", "value": "b"}}, "chosen begins or ends with user"),
    ("sharegpt", SHARE, SHARE | {"chosen": {"from": "gpt", "value": ""}}, "chosen: content of message 0 is empty"),
    ("sharegpt", SHARE, SHARE | {"chosen": SHARE["rejected"]}, "chosen and rejected are the same"),
    ("sharegpt", SHARE, SHARE | {"chosen": {"from": "function_call", "value": "f("}}, "the function call is not JSON"),
    (
        "sharegpt",
        SHARE,
        {"messages": SHARE["conversations"], "kto_tag": True},
        r"a verdict on a single answer \(kto_tag\)",
    ),
    ("alpaca", ALPACA, ALPACA | {"instruction": None}, "no 'instruction'"),
    ("alpaca", ALPACA, ALPACA | {"chosen": ["b"]}, "chosen is a list instead of a string"),
    ("alpaca", ALPACA, ALPACA | {"history": [["a"]]}, "a turn of history is no pair"),
    ("alpaca", ALPACA, ALPACA | {"history": [["a", ""]]}, "content of message 1 is empty"),
    ("alpaca", ALPACA, ALPACA | {"system": 3}, "system is a int instead of a string"),
    ("alpaca", ALPACA, {"instruction": "a", "output": ["b"]}, "output is neither a string nor a list of answers"),
    ("alpaca", ALPACA, {"instruction": "a", "output": ""}, "output is empty"),
    ("hh", HH, HH | {"chosen": "Hello"}, "chosen does not begin with Human:"),
    ("hh", HH, HH | {"chosen": HH["chosen"] + "\n\nHuman: d"}, "chosen ends with Human"),
    ("hh", HH, HH | {"rejected": HH["chosen"] + " "}, "chosen and rejected are the same"),
    ("hh", HH, HH | {"rejected": "\n\nHuman: x\n\nAssistant: c"}, "chosen and rejected share no prompt"),
    ("hh", HH, HH | {"rejected": HH["rejected"] + "\n\nHuman: x\n\nAssistant: y"}, "differ before the last answer"),
    ("hh", HH, HH | {"rejected": "\n\nHuman: a\n\nAssistant:"}, "rejected: content of message 1 is empty"),
    ("helpsteer2", RATED, RATED | {"helpfulness": 5}, "helpfulness is 5, outside 0 to 4"),
    ("helpsteer2", RATED, RATED | {"response": ""}, "response is empty"),
    ("helpsteer2", RATED, {"prompt": "a", "response": "b"}, "no ratings"),
    ("helpsteer2", RATED, RATED | {"prompt": "a\n<extra_id_1>Bot\nb"}, "the prompt has an unknown turn marker"),
    ("helpsteer2", RATED, RATED | {"prompt": "a\n<extra_id_1>Assistant\nb"}, "the last message is from assistant"),
    ("helpsteer2", RATED, RATED | {"prompt": "a\n<extra_id_1>Assistant\n"}, "a turn of the prompt is empty"),
    ("helpsteer2", STRENGTH, STRENGTH | {"preference_strength": -4}, "preference_strength is -4, outside -3 to 3"),
    ("helpsteer2", STRENGTH, STRENGTH | {"response_2": "b"}, "chosen and rejected are the same"),
    ("ultrafeedback", ULTRA, ULTRA | {"completions": []}, "completions is no list of answers"),
    ("ultrafeedback", ULTRA, ULTRA | {"completions": ["b"]}, "completion 0 is a str"),
    ("ultrafeedback", ULTRA, completion(response=None), "the response of completion 0 is no string"),
    ("ultrafeedback", ULTRA, completion(response=""), "the response of completion 0 is empty"),
    ("ultrafeedback", ULTRA, completion(overall_score=None), "completion 0 has no ratings"),
    (
        "ultrafeedback",
        ULTRA,
        completion(annotations={"honesty": {"Rating": "6"}}),
        "honesty of completion 0 is 6, outs",
    ),
    (
        "ultrafeedback",
        ULTRA,
        completion(annotations={"honesty": {"Rating": "ok"}}),
        "honesty of completion 0 is no num",
    ),
    ("ultrafeedback_zh", ULTRA_ZH, ULTRA_ZH | {"rejected_response": "b"}, "chosen and rejected are the same"),
    ("ultrafeedback_zh", ULTRA_ZH, ULTRA_ZH | {"chosen_rating": {"honesty": "0"}}, "honesty of chosen_rating is 0"),
    ("ultrafeedback_zh", ULTRA_ZH, ULTRA_ZH | {"instruction": 1}, "instruction is a int instead of a string"),
]


@pytest.mark.parametrize(("format", "good", "bad", "problem"), CASES)
def test_a_bad_row_is_named_and_the_others_are_kept(
    tmp_path: Path, format: Format, good: dict[str, Any], bad: dict[str, Any], problem: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in (good, bad, good)))
    found = list(read_examples(SourceBlock(source=str(path), format=format)))
    assert [item.number for item in found] == [1, 2, 3]
    assert isinstance(found[0], Example) and isinstance(found[2], Example)
    fault = found[1]
    assert isinstance(fault, Fault)
    assert re.search(problem, fault.problem), fault.problem
    assert fault.cure and fault.value is not None


def test_every_format_has_bad_rows_here() -> None:
    assert {case[0] for case in CASES} == set(get_args(Format)) - {"auto"}
