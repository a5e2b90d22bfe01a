"""Each format of judged text: rows written by hand, and what they hold; nothing is read from files but the demos."""

import json
from pathlib import Path
from typing import Any

import pytest
from trl.data_utils import extract_prompt

from raylign.config.data import Format, SourceBlock
from raylign.data.examples import Completion, Example
from raylign.data.formats import SCALES, examples, resolve_format
from raylign.data.rows import read_examples
from raylign.errors import DataError
from raylign.prompts.tables import Row
from raylign.records import Message

# Beside the project; one folder further up from a git worktree.
ABOVE = Path(__file__).resolve().parents[4:6]
SHARED = next((found for folder in ABOVE if (found := folder / "shared" / "data").is_dir()), Path("../shared/data"))
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
WRAPPED = {"type": "function", "function": WEATHER}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def bot(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def answers(*texts: str) -> tuple[Completion, ...]:
    return tuple(Completion((bot(text),)) for text in texts)


def read(*rows: dict[str, Any], format: Format = "auto", language: str | None = None) -> list[Example]:
    """Examples of rows that are all good, in the format that they are said or found to have."""
    kind = resolve_format(format, "here", rows, language)
    found = list(examples([Row(number, row) for number, row in enumerate(rows)], kind, language))
    assert all(isinstance(item, Example) for item in found), found
    return [item for item in found if isinstance(item, Example)]


def one(row: dict[str, Any], format: Format = "auto") -> Example:
    (example,) = read(row, format=format)
    return example


def test_trl_with_an_explicit_prompt_in_text() -> None:
    example = one({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green.", "id": 7, "tags": ["a"]})
    assert example == Example(0, (user("Sky?"),), answers("Blue.", "Green."), True, meta={"id": 7})


def test_trl_with_conversations_a_system_message_and_tools() -> None:
    prompt = [system("Be brief."), user("Hi"), bot("Hello"), user("Rain?")]
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}]}
    chosen = [call, {"role": "tool", "name": "weather", "content": "rain"}, bot("Yes.")]
    for tools in ([WRAPPED], json.dumps([WRAPPED])):
        example = one({"prompt": prompt, "chosen": chosen, "rejected": [bot("No.")], "tools": tools})
        assert example.prompt == tuple(prompt) and example.tools == (WRAPPED,) and example.ranked
        assert [completion.messages for completion in example.completions] == [tuple(chosen), (bot("No."),)]


def test_trl_with_an_implicit_prompt_in_conversations() -> None:
    before = [system("s"), user("a"), bot("b"), user("c")]
    example = one({"chosen": [*before, bot("good")], "rejected": [*before, bot("bad")]})
    assert example.prompt == tuple(before) and example.completions == answers("good", "bad")


def test_trl_an_answer_in_several_messages_is_not_cut_where_the_other_agrees() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}
    result = {"role": "tool", "content": "rain"}
    chosen, rejected = [user("a"), call, result, bot("good")], [user("a"), call, bot("bad")]
    example = one({"chosen": chosen, "rejected": rejected})
    assert example.prompt == (user("a"),)
    assert [len(completion.messages) for completion in example.completions] == [3, 2]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),
        ("The sky is: blue", "The sky is: green"),
        ("天空是什么颜色？蓝色", "天空是什么颜色？绿色"),
    ],
)
def test_trl_an_implicit_prompt_in_text_is_cut_as_trl_cuts_it(chosen: str, rejected: str) -> None:
    expected = extract_prompt({"chosen": chosen, "rejected": rejected})
    example = one({"chosen": chosen, "rejected": rejected})
    assert example.prompt == (user(str(expected["prompt"])),)
    assert example.completions == answers(str(expected["chosen"]), str(expected["rejected"]))


def test_trl_prompt_completion_and_messages_are_demonstrations() -> None:
    expected = Example(0, (user("a"),), answers("b"), True)
    assert one({"prompt": "a", "completion": "b"}) == expected
    assert one({"prompt": [user("a")], "completion": [bot("b")]}) == expected
    assert one({"messages": [user("a"), bot("b")]}) == expected
    long = one({"messages": [system("s"), user("a"), bot("b"), user("c"), bot("d")]})
    assert long.prompt == (system("s"), user("a"), bot("b"), user("c")) and long.completions == answers("d")


@pytest.mark.parametrize(
    ("extra", "scores"),
    [
        ({"score_chosen": 8.5, "score_rejected": 6}, [8.5, 6.0]),
        ({"chosen_score": "2", "rejected_score": -1}, [2.0, -1.0]),
        ({"margin": 1.5}, [1.5, 0.0]),
        ({"margin": None}, [None, None]),
    ],
)
def test_trl_scores_and_margins(extra: dict[str, Any], scores: list[float | None]) -> None:
    example = one({"prompt": "a", "chosen": "b", "rejected": "c"} | extra)
    assert [completion.score for completion in example.completions] == scores
    assert not example.meta.keys() & extra.keys()


def test_trl_rankings_go_from_best_to_worst() -> None:
    assert one({"prompt": "a", "completions": ["x", "y", "z"]}).completions == answers("x", "y", "z")
    scored = one({"prompt": "a", "completions": ["x", "y", "z"], "scores": [1, 3, 2]})
    assert [(c.messages[0]["content"], c.score) for c in scored.completions] == [("y", 3), ("z", 2), ("x", 1)]
    assert scored.ranked
    assert not one({"prompt": "a", "completions": ["x", "y"], "scores": [2, 2]}).ranked


def test_the_binarized_form_of_ultrafeedback_is_trl_whose_prompt_is_said_twice() -> None:
    row = {
        "prompt": "a",
        "prompt_id": "f0e1",
        "chosen": [user("a"), bot("b")],
        "rejected": [user("a"), bot("c")],
        "messages": [user("a"), bot("b")],
        "score_chosen": 8.0,
        "score_rejected": 7.0,
    }
    expected = Example(0, (user("a"),), (Completion((bot("b"),), 8.0), Completion((bot("c"),), 7.0)), True)
    for format in ("auto", "ultrafeedback"):
        example = one(row, format=format)
        assert (example.prompt, example.completions) == (expected.prompt, expected.completions)
        assert example.meta == {"prompt_id": "f0e1"}


def test_sharegpt_pairs_keep_turns_and_the_system_message() -> None:
    turns = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
        {"from": "human", "value": "c"},
    ]
    pair = {"chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}
    expected = Example(0, (system("s"), user("a"), bot("b"), user("c")), answers("good", "bad"), True)
    assert one({"conversations": turns, "system": "s"} | pair) == expected
    assert one({"conversations": [{"from": "system", "value": "s"}, *turns]} | pair) == expected
    assert one({"messages": turns, "system": "s"} | pair) == expected
    chat = {"chosen": bot("good"), "rejected": bot("bad")}
    assert one({"messages": [system("s"), user("a"), bot("b"), user("c")]} | chat) == expected


def test_sharegpt_demonstrations_with_function_calls() -> None:
    call = {"name": "weather", "arguments": {"city": "Bern"}}
    turns = [
        {"from": "human", "value": "Rain in Bern?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Yes."},
    ]
    example = one({"conversations": turns, "tools": json.dumps([WEATHER]), "system": ""})
    asked = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    assert example.prompt == (user("Rain in Bern?"), asked, {"role": "tool", "content": "rain"})
    assert example.completions == answers("Yes.") and example.tools == (WRAPPED,)


def test_sharegpt_a_function_call_can_be_the_better_answer() -> None:
    call = {"from": "function_call", "value": '[{"name": "weather", "arguments": {}}]'}
    turns = [{"from": "human", "value": "Rain?"}]
    example = one({"conversations": turns, "chosen": call, "rejected": {"from": "gpt", "value": "No."}})
    assert example.completions[0].messages[0]["tool_calls"][0]["function"]["name"] == "weather"


def test_alpaca_pairs_with_input_system_and_history() -> None:
    row = {"instruction": "Translate.", "input": "Hund", "system": "s", "history": [["a", "b"]]}
    expected = Example(0, (system("s"), user("a"), bot("b"), user("Translate.\nHund")), answers("dog", "cat"), True)
    assert one(row | {"chosen": "dog", "rejected": "cat"}) == expected
    assert one(row | {"output": ["dog", "cat"]}) == expected


def test_alpaca_demonstrations_and_rankings() -> None:
    assert one({"instruction": "a", "input": "", "output": "b"}) == Example(0, (user("a"),), answers("b"), True)
    assert one({"instruction": "a", "output": ["b", "c", "d"]}).completions == answers("b", "c", "d")


def test_hh_dialogues_share_all_turns_but_the_last() -> None:
    shared = "\n\nHuman: a\n\nAssistant: b\nc\n\nHuman: d"
    row = {"chosen": f"{shared}\n\nAssistant: good", "rejected": f"{shared}\n\nAssistant: bad\n\nvery"}
    assert one(row) == Example(0, (user("a"), bot("b\nc"), user("d")), answers("good", "bad\n\nvery"), True)


def rated(prompt: str, response: str, helpfulness: int = 3) -> dict[str, Any]:
    others = {"correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 0}
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness} | others


def test_helpsteer2_joins_adjacent_rows_of_a_prompt() -> None:
    rows = [rated("a", "x"), rated("a", "y", 1), rated("b", "z"), rated("a", "w")]
    found = read(*rows)
    assert [(example.number, len(example.completions), example.ranked) for example in found] == [
        (0, 2, False),
        (2, 1, False),
        (3, 1, False),
    ]
    assert found[0].completions[1].ratings == {
        "helpfulness": 1.0,
        "correctness": 4.0,
        "coherence": 4.0,
        "complexity": 1.0,
        "verbosity": 0.0,
    }
    assert found[0].completions[1].score is None


def test_helpsteer2_turn_markers_become_turns() -> None:
    prompt = "a\nb\n<extra_id_1>Assistant\nc\n<extra_id_1>User\nd"
    assert one(rated(prompt, "x")).prompt == (user("a\nb"), bot("c"), user("d"))


@pytest.mark.parametrize(
    ("strength", "order", "scores", "ranked"),
    [(-2, ["x", "y"], [2, 0], True), (3, ["y", "x"], [3, 0], True), (0, ["x", "y"], [0, 0], False)],
)
def test_helpsteer2_preferences(strength: int, order: list[str], scores: list[float], ranked: bool) -> None:
    row = {"prompt": "a", "response_1": "x", "response_2": "y", "preference_strength": strength, "split": "train"}
    example = one(row)
    assert [completion.messages[0]["content"] for completion in example.completions] == order
    assert [completion.score for completion in example.completions] == scores
    assert example.ranked is ranked and example.meta == {"split": "train"}


def judged(response: str, overall: float | None = None, **ratings: object) -> dict[str, Any]:
    annotations = {name: {"Rating": value, "Rationale": "..."} for name, value in ratings.items()}
    return {"model": "m", "response": response, "annotations": annotations, "overall_score": overall}


def test_ultrafeedback_keeps_ratings_in_their_own_units() -> None:
    completions = [judged("x", 7.5, helpfulness="4", honesty="N/A"), judged("y", truthfulness="5", honesty=2)]
    example = one({"source": "sharegpt", "instruction": "a", "completions": completions, "models": ["m"]})
    assert (example.prompt, example.ranked, example.language) == ((user("a"),), False, None)
    assert [(c.score, c.ratings) for c in example.completions] == [
        (7.5, {"helpfulness": 4.0}),
        (None, {"truthfulness": 5.0, "honesty": 2.0}),
    ]
    assert example.meta == {"source": "sharegpt"}


def test_ultrafeedback_zh_in_both_its_forms() -> None:
    whole = {"instruction": "天空是什么颜色？", "completions": [judged("蓝色", 4.6, helpfulness="5")]}
    assert (one(whole).language, one(whole).completions[0].ratings) == ("zh", {"helpfulness": 5.0})
    pair = {
        "instruction": "天空是什么颜色？",
        "chosen_response": "蓝色",
        "rejected_response": "绿色",
        "chosen_rating": {"overall_score": 4.6, "helpfulness": "5", "honesty": "N/A"},
        "rejected_rating": {"overall_score": 1.0, "helpfulness": "1", "honesty": "N/A"},
        "source": "wizard",
    }
    example = one(pair)
    assert example.language == "zh" and example.ranked and example.meta == {"source": "wizard"}
    assert example.completions == (
        Completion((bot("蓝色"),), 4.6, {"helpfulness": 5.0}),
        Completion((bot("绿色"),), 1.0, {"helpfulness": 1.0}),
    )


def test_scales_bound_what_the_formats_rate() -> None:
    assert SCALES["helpsteer2"]["verbosity"] == (0, 4) and len(SCALES["helpsteer2"]) == 5
    assert SCALES["ultrafeedback"] == SCALES["ultrafeedback_zh"] and SCALES["ultrafeedback"]["honesty"] == (1, 5)
    assert SCALES["trl"] == {}


def test_the_language_is_the_config_s_else_the_row_s_else_the_format_s() -> None:
    row = {"prompt": "a", "completion": "b"}
    assert read(row | {"language": "de"})[0].language == "de"
    assert read(row | {"language": "de"}, language="fr")[0].language == "fr"
    assert read(row | {"language": "german"})[0].language is None


def test_meta_leaves_out_long_texts_and_nested_values() -> None:
    extra = {"id": "x", "long": "y" * 257, "list": [1], "nan": float("nan"), "flag": True}
    assert one({"prompt": "a", "completion": "b"} | extra).meta == {"id": "x", "flag": True}


def test_rows_of_another_kind_do_not_change_what_the_format_is() -> None:
    pair = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    assert resolve_format("auto", "here", [pair, {"chosen": "x", "rejected": "y"}, pair], None) == "hh"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "a", "answer": "b"}, "is none that is known: it has the columns question, answer"),
        (
            {"prompt": "a", "instruction": "a", "chosen": "b", "rejected": "c"},
            "may be any of alpaca, trl: it has the columns prompt, instruction, chosen, rejected",
        ),
        ({}, "is none that is known: it has no columns"),
    ],
)
def test_unknown_and_ambiguous_columns_list_the_formats(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        resolve_format("auto", "here", [row], None)
    assert "set format to one of trl (prompt, chosen, rejected or chosen, rejected or" in str(caught.value)


def test_a_named_format_must_fit() -> None:
    row = {"instruction": "a", "output": "b"}
    with pytest.raises(DataError, match=r"columns of format hh \(chosen, rejected\), it has the columns instruction"):
        resolve_format("hh", "here", [row], None)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the demo data of ../shared/data is not on this machine")
@pytest.mark.parametrize(("name", "multi_turn"), [("dpo_en_demo.json", 106), ("dpo_zh_demo.json", 0)])
def test_the_demo_files_are_read_whole(name: str, multi_turn: int) -> None:
    stream = read_examples(SourceBlock(source=str(SHARED / name)))
    found = [item for item in stream if isinstance(item, Example)]
    assert stream.format == "sharegpt" and [example.number for example in found] == list(range(300))
    assert all(example.ranked and len(example.completions) == 2 for example in found)
    assert sum(len([m for m in example.prompt if m["role"] == "user"]) > 1 for example in found) == multi_turn
    rows = json.loads((SHARED / name).read_text())
    for example, row in zip(found, rows, strict=True):
        said = [message["content"] for message in example.prompt]
        assert said == [message["value"] for message in row["conversations"]]
        assert example.completions[1].messages == (bot(row["rejected"]["value"]),)
