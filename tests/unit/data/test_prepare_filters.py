"""What drops a pair by itself, and the language it is in."""

import pytest

from raylign.config.prepare import FiltersBlock
from raylign.data.prepare.accounts import Filters, PairText, language_of
from raylign.data.prepare.table import text_of

GOOD = "The capital of France is Paris."
OTHER = "It might be Lyon, I think."


def problem(chosen: str, rejected: str, **options: object) -> str | None:
    return Filters(FiltersBlock.model_validate(options)).problem(PairText("Which city?", chosen, rejected))


def test_a_fit_pair_passes() -> None:
    assert problem(GOOD, OTHER) is None


def test_answers_that_differ_in_outer_blanks_alone_are_the_same() -> None:
    assert problem(GOOD, f" {GOOD}\n") == "same_answer"


def test_either_answer_may_be_too_short_and_outer_blanks_do_not_count() -> None:
    assert problem("Paris.   \n\n", OTHER) == "short"
    assert problem(GOOD, "123456789") == "short"
    assert problem(GOOD, "1234567890") is None


def test_the_longer_answer_counts_with_the_prompt() -> None:
    # 11 characters of prompt and 31 of the answer.
    assert problem(GOOD, OTHER, max_chars=42) is None
    assert problem(GOOD, OTHER, max_chars=41) == "long"


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI language model, I do not have feelings.",
        "Well, as a artificial intelligence assistant I may not say",
        "I'm sorry, but I can't do that for you.",
        "I cannot assist with that request, friend.",
        "作为一个人工智能语言模型，我没有个人观点。",
        "很抱歉，我无法回答这个问题，请换一个。",
        "我是一个AI助手，没有自己的感情。",
    ],
)
def test_templates_in_both_languages_are_found_in_either_answer(answer: str) -> None:
    assert problem(answer, OTHER) == "template"
    assert problem(GOOD, answer) == "template"


@pytest.mark.parametrize(
    "answer",
    [
        "The model of an AI is trained on text.",
        "She said: I'm sorry, but I can't come.",
        "他说：抱歉，我无法参加明天的会议。",
    ],
)
def test_answers_that_only_speak_of_such_things_stay(answer: str) -> None:
    assert problem(answer, OTHER) is None


def test_own_templates_replace_the_defaults() -> None:
    assert problem(GOOD, "As an AI language model, no.", templates=["lyon"]) is None
    assert problem(GOOD, OTHER, templates=["lyon"]) == "template"


def test_text_has_calls_and_leaves_out_the_system() -> None:
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "rain", "arguments": {"town": "Köln"}}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "sun", "arguments": '{"a": 1}'}]},
    )
    assert text_of(messages) == 'Rain?\nrain {"town": "Köln"}\nsun {"a": 1}'


@pytest.mark.parametrize(
    ("prompt", "answer", "language"),
    [
        ("What is the capital of France?", "The capital is Paris, which you can see from the tower.", "en"),
        ("法国的首都是哪里？", "法国的首都是巴黎。", "zh"),
        ("用Python写一个函数", "def add(a, b):\n    return a + b\n这个函数返回两个数的和，非常简单。", "zh"),
        ("フランスの首都はどこですか", "フランスの首都はパリです。", "ja"),
        ("프랑스의 수도는 어디입니까", "프랑스의 수도는 파리입니다.", "ko"),
        ("Quelle est la capitale de la France ?", "La capitale de la France est Paris, bien sûr.", "fr"),
        ("Wie heißt die Hauptstadt von Frankreich?", "Die Hauptstadt von Frankreich ist Paris.", "de"),
        ("2 + 2", "4 = 4", "zxx"),
    ],
)
def test_languages(prompt: str, answer: str, language: str) -> None:
    assert language_of(PairText(prompt, answer, "")) == language
