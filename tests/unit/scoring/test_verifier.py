"""Scores from reference answers: mathematics, text, patterns, and comparisons that never end."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from raylign.config import parse_config
from raylign.config.scoring import FunctionScoringBlock, GateScoringBlock, VerifierScoringBlock
from raylign.errors import ConfigError, ScorerError
from raylign.records import Prompt, Score
from raylign.scoring.base import ScoringItem
from raylign.scoring.load import describe_scorer
from raylign.scoring.verifier import VerifierScorer, require_references
from raylign.scoring.verify import verify
from tests.faults import record

Make = Callable[..., VerifierScorer]
RULES = VerifierScoringBlock().model_dump(mode="json")


@pytest.fixture
def make() -> Iterator[Make]:
    """Verifiers, ended at the end."""
    with ExitStack() as stack:

        def _make(**options: Any) -> VerifierScorer:
            scorer = VerifierScorer(VerifierScoringBlock(**{"max_unscored": 1.0, **options}))
            stack.callback(scorer.close)
            return scorer

        yield _make


def item(completion: str, *answers: object, prompt: str = "p0") -> ScoringItem:
    return ScoringItem(Prompt(prompt, (), (1,), {"answer": answers[0]} if answers else {}), completion)


def one(answer: str, completion: str, **rules: Any) -> Score:
    return verify([answer], [completion], RULES | rules)[0]


@pytest.mark.parametrize(
    ("answer", "completion", "value"),
    [
        ("1/2", "So the answer is $0.5$.", 1.0),
        ("\\frac{1}{2}", "\\boxed{\\frac{2}{4}}", 1.0),
        ("1,234", "There are 1234 of them.", 1.0),
        ("1 000", "The answer is 1000", 1.0),
        ("1 000", "The answer is 0", 0.0),
        ("72", "48 + 24 = 72, so 72 clips.", 1.0),
        ("72", "First 72, no, it is 73.", 0.0),
        ("x^2+1", "$1+x^2$", 1.0),
        ("$\\sqrt{8}$", "$2\\sqrt{2}$", 1.0),
        ("{1, 2}", "The set is $\\{2, 1\\}$", 1.0),
        ("-3.5", "\\boxed{-7/2}", 1.0),
        ("3", "I do not know.", 0.0),
        ("3", "", 0.0),
        ("12:30", "12:30", 1.0),
        ("3", "3 is wrong, \\boxed{4} is right", 0.0),
    ],
)
def test_mathematics_is_compared_as_mathematics(answer: str, completion: str, value: float) -> None:
    assert one(answer, completion) == Score(value)


def test_a_pattern_takes_the_final_answer(make: Make) -> None:
    scorer = make(extract="#### (.*)", extract_answer="#### (.*)")
    reference = "He pays 3 x 4 = 12.\n#### 12"
    scores = scorer.score([item(c, reference) for c in ("12 is it\n#### 11", "no. #### 1\n#### 12.0", "It is 12")])
    assert scores == [Score(0.0, {"extracted": 1.0}), Score(1.0, {"extracted": 1.0}), Score(0.0, {"extracted": 0.0})]
    assert make(extract="#### (.*)").score([item("#### a(b+1)", "ab+a")])[0].value == 1.0
    unmarked = scorer.score([item("#### 12", "just 12")])[0]
    assert unmarked == Score(None, reason="extract_answer finds nothing in the reference 'just 12'")


@pytest.mark.parametrize(
    ("rules", "answer", "completion", "value"),
    [
        ({}, "New York", "  new  york\n", 1.0),
        ({}, "New York", "in New York", 0.0),
        ({"casefold": False}, "New York", "new york", 0.0),
        ({"strip": False}, "Paris", "Paris ", 0.0),
        ({"extract": r"Answer: (\w)"}, "B", "A? Answer: A. No. Answer: b.", 1.0),
        ({"extract": "[A-D]"}, "D", "B or D", 1.0),
    ],
)
def test_exact_match(rules: dict[str, Any], answer: str, completion: str, value: float) -> None:
    assert one(answer, completion, method="exact_match", **rules).value == value


@pytest.mark.parametrize(
    ("pattern", "answer", "completion", "value"),
    [
        ("Answer: {answer}$", "a.c", "Answer: a.c", 1.0),
        ("Answer: {answer}$", "a.c", "Answer: abc", 0.0),
        (r"^\d{2}$", "", "42", 1.0),
        (r"^\d{2}$", "", "421", 0.0),
    ],
)
def test_a_pattern_with_the_answer_in_it_taken_literally(
    pattern: str, answer: str, completion: str, value: float
) -> None:
    assert one(answer, completion, method="regex", pattern=pattern) == Score(value)


def test_items_without_a_reference_are_unscored_and_the_others_keep_their_order(make: Make) -> None:
    items = [
        item("1", 1),
        item("1"),
        item("2", 3.0),
        item("2", "  "),
        item("2", ["2"]),
        item("1", True),
        item("4", "4"),
    ]
    scores = make(batch_size=2).score(items)
    assert [score.value for score in scores] == [1.0, None, 0.0, None, None, None, 1.0]
    assert scores[1].reason == scores[3].reason == "no reference answer in column 'answer' (prompt p0)"
    assert scores[4].reason == "the reference answer in column 'answer' is a list, not a text or number (prompt p0)"
    assert make(method="regex", pattern="a+").score([item("baa")]) == [Score(1.0)]


def test_a_reference_that_is_no_mathematics_is_unscored() -> None:
    score = one("$$", "3")
    assert score == Score(None, reason="no mathematics in the reference '$$'")


def test_missing_references_count_towards_what_may_be_lost(make: Make) -> None:
    scores = make().score([item("1"), item("1"), item("1", "1")], allowed=1)
    assert [score.value for score in scores] == [None, None, None]
    assert scores[2].reason.startswith("skipped")


@pytest.mark.fault
def test_backtracking_ends_at_the_deadline_of_its_item(make: Make) -> None:
    scorer = make(method="regex", pattern="(a+)+$", timeout_s=1.0)
    scores = scorer.score([item("aaa"), item("a" * 40 + "b"), item("b"), item("a")])
    assert [score.value for score in scores] == [1.0, None, 0.0, 1.0]
    assert scores[1].reason == "no verdict within 1 s"
    record(
        "verifier that never ends",
        "a completion on which a pattern backtracks without end",
        detected_s=1.0,
        lost="that candidate stays unscored, with the reason",
    )


@pytest.mark.parametrize("endless", ["$10^{10^{10}}$", "$100000000!$", "$" + "{" * 2000 + "$"])
def test_mathematics_that_never_ends_is_unscored(make: Make, endless: str) -> None:
    scores = make(timeout_s=1.0).score([item(endless, "3"), item("3", "3")])
    assert scores == [Score(None, reason="no verdict within 1 s"), Score(1.0)]


def test_a_process_that_takes_no_alarm_is_ended(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylign.scoring.verifier.VERIFY", "deaf_verify:verify")
    monkeypatch.setattr("raylign.scoring.verifier.GRACE_S", 0.2)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    scores = make(timeout_s=1.0).score([item("1", "1"), item("hang", "1")])
    assert scores == [Score(1.0), Score(None, reason="no answer within 1.2 s")]


def test_prompts_without_answers_are_told_before_anything_starts() -> None:
    items = [item("", "1"), item("", prompt="p1"), item("", "2", prompt="p2"), item("", ["3"], prompt="p3")]
    prompts, block = [one.prompt for one in items], VerifierScoringBlock(max_unscored=0.5)
    gate = GateScoringBlock(gate=VerifierScoringBlock(), score=FunctionScoringBlock(), max_unscored=0.25)
    require_references(prompts, block)
    require_references(prompts, VerifierScoringBlock(method="regex", pattern="a"))
    with pytest.raises(ScorerError, match="^2 of 4 prompts cannot be verified, scoring.max_unscored=0.25 allows 25%"):
        require_references(prompts, gate)
    with pytest.raises(
        ScorerError, match="the first: no reference answer in column 'target' .prompt p0.. Give the rows"
    ):
        require_references(prompts, VerifierScoringBlock(answer_column="target"))


def test_describe_says_how_it_compares() -> None:
    block = VerifierScoringBlock(method="exact_match", extract="#### (.*)", answer_column="target")
    assert describe_scorer(block) == (
        "verifier by exact_match",
        "reference answers in column 'target'",
        "extract: #### (.*)",
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("scoring.extract='('", "'(' is no regular expression (missing ), unterminated subpattern at position 0)"),
        ("scoring.method=regex", "method=regex needs pattern, for example pattern='Answer: {answer}$'"),
        ("scoring.pattern=a", "pattern='a' is for method=regex, not math; use extract to find answers"),
        ("scoring.method=maths", "Input should be 'math', 'exact_match', 'regex' or 'ifeval'"),
    ],
)
def test_wrong_options_are_refused(option: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"scoring": {"type": "verifier"}}, [option])
    assert message in str(caught.value)
