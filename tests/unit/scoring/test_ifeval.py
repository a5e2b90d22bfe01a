"""IFEval's checks, each by an answer that follows it and one that does not, and the four accuracies."""

import json
from typing import Any

import pytest

from raylign.config.scoring import VerifierScoringBlock
from raylign.errors import ScorerError
from raylign.records import Prompt
from raylign.scoring.base import ScoringItem
from raylign.scoring.ifeval import CHECKS, UNCHECKED, follows, read_instructions
from raylign.scoring.verifier import VerifierScorer, require_references

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["sun", "moon"]}, ["Sun and moonlight"], ["sun"]),
    ("keywords:frequency", {"keyword": "ha", "frequency": 2, "relation": "at least"}, ["Ha ha"], ["ha"]),
    ("keywords:frequency", {"keyword": "ha", "frequency": 2, "relation": "less than"}, ["ha", "no"], ["Haha"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["category"], ["a Cat!"]),
    (
        "keywords:letter_frequency",
        {"letter": "E", "let_frequency": 3, "let_relation": "at least"},
        ["Eee"],
        ["eat me"],
    ),
    ("language:response_language", {"language": "de"}, ["Das ist ein ganz einfacher Satz."], ["This is a sentence."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***a***b***"], ["a", "a *** *** b"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["it's ok"], ["two words"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        ["One.\n\n'then, two"],
        ["One.\n\nNow", "Then", "a\n\nthen\n\nthird"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b c]"], ["[a]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye\np. s. more"], ["PS more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S more"], ["P.S. more"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n- b"], ["* a", "** a\n** b"]),
    ("detectable_format:constrained_response", {}, ["My answer is maybe."], ["Maybe."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and *b*"], ["*a* and ** **"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1 x SECTION 2 y"],
        ["SECTION 1 x"],
    ),
    ("detectable_format:json_format", {}, ['```json\n{"a": 1}\n```', "[1]"], ["{a: 1}"]),
    ("detectable_format:title", {}, ["<<A title>>\ntext"], ["<< >>", "<title>"]),
    ("combination:two_responses", {}, ["a ****** b"], ["a", "a ****** a", "a******b******c"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Why so?"}, [" why so? Because"], ["Because"]),
    ("startend:end_checker", {"end_phrase": "The End."}, ['... "the end."'], ["The End. Really"]),
    ("startend:quotation", {}, ['"quoted"'], ['"', 'a "quote"']),
    ("change_case:english_capital", {}, ["THIS IS WRITTEN IN ENGLISH FOR YOU"], ["This is written in English"]),
    ("change_case:english_lowercase", {}, ["this is written in english for you"], ["This is written in English"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_each_check(name: str, arguments: dict[str, Any], good: list[str], bad: list[str]) -> None:
    for answer in good:
        assert follows([(name, arguments)], answer).value == 1.0, answer
    for answer in [*bad, " \n"]:
        assert follows([(name, arguments)], answer).value == 0.0, answer


def test_all_25_are_checked_or_named() -> None:
    assert {name for name, *_ in CASES} == set(CHECKS)
    assert len(CHECKS) + len(UNCHECKED) == 25 and not set(CHECKS) & set(UNCHECKED)


def test_four_accuracies() -> None:
    """The comma is in the first line, which loose accuracy may leave out; the title is nowhere."""
    told: list[tuple[str, dict[str, Any]]] = [
        ("punctuation:no_comma", {}),
        ("detectable_format:title", {}),
        ("startend:quotation", {}),
    ]
    score = follows(told, 'Sure, here it is:\n"text"')
    assert score.value == 0.0 and score.parts == {
        "prompt_strict": 0.0,
        "prompt_loose": 0.0,
        "instruction_strict": 0.0,
        "instruction_loose": pytest.approx(2 / 3),
        "instructions": 3.0,
    }
    assert follows(told[:1], "Sure, yes:\ntext").parts["prompt_loose"] == 1.0
    assert follows([("keywords:existence", {"keywords": ["a b"]})], "a *b*").parts["prompt_loose"] == 1.0  # asterisks


@pytest.mark.parametrize(
    ("cell", "refusal"),
    [
        ([["length_constraints:number_sentences", {}], ["punctuation:no_comma", {}]], "need nltk's data: length_con"),
        ([["startend:rhyme", {}]], "are not known here: startend:rhyme"),
        ([], "not a list of instructions"),
        ([["punctuation:no_comma"]], "not a list of instructions"),
    ],
)
def test_what_is_not_checked_is_refused_by_name(cell: object, refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal):
        read_instructions(json.dumps(cell))


def prompt(name: str, *instructions: object) -> Prompt:
    return Prompt(name, (), (1,), {"ifeval": json.dumps(instructions)} if instructions else {})


def test_as_a_verifier() -> None:
    block = VerifierScoringBlock(method="ifeval", cache=None, max_unscored=1.0)
    scorer = VerifierScorer(block)
    try:
        sentences = prompt("b", ["length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}])
        items = [
            ScoringItem(prompt("a", ["punctuation:no_comma", {}]), "none here"),
            ScoringItem(sentences, "One. Two."),
            ScoringItem(prompt("c"), "anything"),
            ScoringItem(prompt("d", ["keywords:frequency", {"keyword": "a"}]), "a"),
        ]
        kept, unread, bare, short = scorer.score(items)
    finally:
        scorer.close()
    assert (kept.value, kept.parts["instruction_loose"]) == (1.0, 1.0)
    assert unread.value is None and "need nltk's data: length_constraints:number_sentences (prompt b)" in unread.reason
    assert bare.value is None and "column 'ifeval'" in bare.reason
    assert short.value is None and "KeyError" in short.reason
    with pytest.raises(ScorerError, match="1 of 2 prompts cannot be verified"):
        require_references([items[0].prompt, sentences], block.model_copy(update={"max_unscored": 0.2}))


@pytest.mark.parametrize("extra", [{"answer_column": "gold"}, {"extract": "x"}])
def test_options_of_other_methods_are_refused(extra: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="with method=ifeval"):
        VerifierScoringBlock.model_validate({"method": "ifeval"} | extra)
