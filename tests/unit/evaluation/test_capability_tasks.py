"""What capability is measured on: the embedded sets, the sums, and files of users."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from raylign.config.capability import CapabilityBlock
from raylign.errors import DataError
from raylign.evaluation.capability.arithmetic import arithmetic_sums
from raylign.evaluation.capability.tasks import Passage, Question, load_task

RIGHT: Mapping[str, Callable[..., int]] = {
    r"What is (\d+) \+ (\d+)\?": lambda a, b: a + b,
    r"What is (\d+) - (\d+)\?": lambda a, b: a - b,
    r"What is (\d+) x (\d+)\?": lambda a, b: a * b,
    r"Tom has (\d+) apples\. He buys (\d+) more and gives away (\d+)\. .*": lambda a, b, c: a + b - c,
    r"A box holds (\d+) pens\. Mia has (\d+) boxes and (\d+) loose pens\. .*": lambda a, b, c: a * b + c,
    r"Ann earns (\d+) coins a day\. She works (\d+) days and spends (\d+) coins\. .*": lambda a, b, c: a * b - c,
    r"There are (\d+) birds in a tree\. (\d+) fly away and (\d+) come back\. .*": lambda a, b, c: a - b + c,
    r"(\d+) children have (\d+) books each\. They give (\d+) books away\. .*": lambda a, b, c: a * b - c,
}


def right_result(text: str) -> int:
    """Worked out from the words alone."""
    matches = ((match, work) for form, work in RIGHT.items() if (match := re.fullmatch(form, text)))
    match, work = next(matches)
    return work(*map(int, match.groups()))


def questions(task: str) -> list[Question]:
    return [item for item in load_task(task).items if isinstance(item, Question)]


def test_the_questions_are_apart_and_each_place_is_right_as_often() -> None:
    found = questions("multiple_choice")
    assert len(found) == 120
    assert len({item.context.lower() for item in found}) == len(found)
    assert len({(item.context, item.choices[item.answer]) for item in found}) == len(found)
    assert all(len(set(map(str.lower, item.choices))) == 4 for item in found)
    assert Counter(item.answer for item in found) == {place: 30 for place in range(4)}
    lengths = [sum(len(item.choices[item.answer]) > len(choice) for choice in item.choices) for item in found]
    longest = lengths.count(3) / len(found)
    assert 0.1 < longest < 0.4, "whoever takes the longest choice is right no more often than by chance"


def test_the_questions_are_of_several_subjects() -> None:
    path = Path(__file__).parents[3] / "platform/raylign/prompts/multiple_choice.json"
    subjects = Counter(row["subject"] for row in json.loads(path.read_text()))
    assert len(subjects) == 8 and min(subjects.values()) >= 10


def test_no_choice_answers_many_questions() -> None:
    rights = Counter(item.choices[item.answer].lower() for item in questions("multiple_choice"))
    assert max(rights.values()) == 1


def test_the_texts_are_apart_and_long_enough() -> None:
    found = [item.text for item in load_task("perplexity").items if isinstance(item, Passage)]
    words = [text.split() for text in found]
    assert len(found) == 24 and sum(map(len, words)) > 3000 and min(map(len, words)) > 100
    runs = [tuple(text[i : i + 6]) for text in words for i in range(len(text) - 5)]
    assert len(set(runs)) > 0.999 * len(runs), "no text repeats another"


def test_sums_are_right_balanced_and_apart() -> None:
    found = arithmetic_sums()
    assert len(found) == len({one.text for one in found}) == 100
    for one in found:
        assert one.choices[one.answer] == str(right_result(one.text)), one.text
        assert len(set(one.choices)) == 4 and all(choice.isdigit() for choice in one.choices)
        near = sorted(abs(int(choice) - int(one.choices[one.answer])) for choice in one.choices)
        assert near[2] <= 10, "at least two wrong ones are close"
    assert Counter(one.answer for one in found) == {place: 25 for place in range(4)}
    kinds = Counter(next(form for form in RIGHT if re.fullmatch(form, one.text)) for one in found)
    assert [kinds[form] for form in list(RIGHT)[:3]] == [25, 25, 25] and len(kinds) == len(RIGHT)


def test_sums_depend_on_the_seed_alone() -> None:
    assert arithmetic_sums(40, seed=1) == arithmetic_sums(40, seed=1)
    assert {one.text for one in arithmetic_sums(40, seed=1)} != {one.text for one in arithmetic_sums(40, seed=2)}
    assert arithmetic_sums(8, seed=1) == arithmetic_sums(40, seed=1)[:8]


def test_files_of_users(tmp_path: Path) -> None:
    (tmp_path / "law.jsonl").write_text(
        '{"question": "Who judges?", "choices": ["a judge", "a cook"], "answer": 0}\n'
        '{"question": "Where?", "choices": ["at home", "in court", "at sea"], "answer": 1, "id": "where"}\n'
    )
    (tmp_path / "news.json").write_text('[{"text": "It rained."}, {"text": "It stopped."}]')
    law, news = load_task(str(tmp_path / "law.jsonl")), load_task(str(tmp_path / "news.json"))
    assert law.name == "law" and law.items == (
        Question("1", "Question: Who judges?\nAnswer:", ("a judge", "a cook"), 0),
        Question("where", "Question: Where?\nAnswer:", ("at home", "in court", "at sea"), 1),
    )
    assert news.items == (Passage("0", "It rained."), Passage("1", "It stopped."))
    assert law.digest != news.digest and len(law.digest) == 64


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"question": "", "choices": ["a", "b"], "answer": 0}', "line 1: question is empty, or no text; write one"),
        ('{"question": "q", "choices": "ab", "answer": 0}', "choices is no list of texts"),
        ('{"question": "q", "choices": ["a", " "], "answer": 0}', "choices is no list of texts"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "1 choices, 1 of them apart; give at least 2"),
        ('{"question": "q", "choices": ["a", "a"], "answer": 0}', "2 choices, 1 of them apart"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer=2 is no place in 2 choices; give .* 0 to 1"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "answer=True is no place"),
        ('{"question": "q", "choices": ["a", "b"]}', "answer=None is no place"),
        ('{"prompt": "q"}', "neither a text nor a question; give rows with text, or rows with question"),
        ("[1]", "list instead of an object"),
        ("", "no rows; give rows with text"),
        ('{"text": "t"}\n{"question": "q", "choices": ["a", "b"], "answer": 1}', "texts and questions in one file"),
        ('{"text": "t", "id": 1}\n{"text": "u", "id": "1"}', "two rows have the id '1'; give each its own"),
    ],
)
def test_bad_rows_are_named(row: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(row)
    with pytest.raises(DataError, match=problem) as caught:
        load_task(str(tmp_path / "own.jsonl"))
    assert "evaluation.capability.tasks" in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file or folder"):
        load_task(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("tasks", "problem"),
    [
        ([], "no task is named; name one, or leave the block out"),
        (["perplexty"], "'perplexty' is no task; take perplexity, multiple_choice, arithmetic, a .jsonl"),
        (["lm_eval:"], "'lm_eval:' is no task"),
        (["a/law.json", "b/law.jsonl"], "two tasks would be called 'law' in metrics"),
        (["arithmetic", "arithmetic"], "two tasks would be called 'arithmetic'"),
    ],
)
def test_tasks_that_are_none_are_refused(tasks: list[str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        CapabilityBlock.model_validate({"tasks": tasks})


def test_when_it_is_due() -> None:
    block, often = CapabilityBlock(), CapabilityBlock(every=2)
    assert [index for index in range(6) if block.is_due(index, last=index == 5)] == [0, 5]
    assert [index for index in range(6) if often.is_due(index, last=index == 5)] == [0, 2, 4, 5]
