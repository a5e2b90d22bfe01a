"""Scores on disk: what is asked again, what never is, damage, and several writers at once."""

import logging
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from raylign import scoring
from raylign.config.scoring import FunctionScoringBlock, HttpScoringBlock, JudgeScoringBlock, VerifierScoringBlock
from raylign.errors import ScorerError
from raylign.records import Prompt, Score
from raylign.scoring.base import ScoringItem
from raylign.scoring.cache import CachedScorer, ScoreCache
from raylign.scoring.kind import identity
from raylign.scoring.load import load_scorer
from raylign.scoring.usage import Usage
from tests.faults import record
from tests.judges import honest, serving, values
from tests.scorers import Told, of_prompt, table

HERE = Path(__file__).parents[1]


def cached(scorer: Told, folder: Path, usage: Usage | None = None, identity: str = "one") -> CachedScorer:
    cache = ScoreCache(folder / "scores.sqlite")
    return CachedScorer(scorer, cache, identity, usage or Usage(), context=lambda item: item.prompt.meta.get("answer"))


def test_what_is_known_is_not_asked_again_and_the_order_stays(tmp_path: Path) -> None:
    scorer, usage = table(a=Score(1.0, {"x": 2.0}), b=2.0, c=3.0), Usage()
    assert values(cached(scorer, tmp_path, usage).score(of_prompt("p", "b", "a"))) == [2.0, 1.0]
    scores = cached(scorer, tmp_path, usage).score(of_prompt("p", "a", "c", "b"))
    assert scores == [Score(1.0, {"x": 2.0}), Score(3.0), Score(2.0)]
    assert scorer.asked == [["b", "a"], ["c"]] and usage.cache_hits == 2


def test_the_key_is_scorer_conversation_completion_and_context(tmp_path: Path) -> None:
    scorer = table(a=1.0)
    [item] = of_prompt("p", "a")
    other_id = ScoringItem(Prompt("q", item.prompt.messages, (9,)), "a")
    answered = ScoringItem(Prompt("p", item.prompt.messages, (1,), {"answer": "7"}), "a")
    cached(scorer, tmp_path).score([item])
    cached(scorer, tmp_path).score([other_id])
    assert len(scorer.asked) == 1, "the same conversation under another id"
    cached(scorer, tmp_path).score(of_prompt("r", "a"))
    cached(scorer, tmp_path).score([answered])
    cached(scorer, tmp_path, identity="two").score([item])
    assert len(scorer.asked) == 4


def test_what_is_unscored_is_never_kept(tmp_path: Path) -> None:
    scorer = table(a=None, b=1.0)
    for _ in range(2):
        assert cached(scorer, tmp_path).score(of_prompt("p", "a", "b"))[0] == Score(None, reason="no idea")
    assert scorer.asked == [["a", "b"], ["a"]]


def test_what_may_be_lost_is_passed_on(tmp_path: Path) -> None:
    scorer = table(a=1.0)
    cached(scorer, tmp_path).score(of_prompt("p", "a"), 3)
    assert scorer.allowed == [3]


@pytest.mark.fault
def test_a_damaged_file_is_set_aside_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = of_prompt("p", *("x" * n for n in range(300)))
    for damage in ("text", "middle"):
        scorer, folder = Told(lambda text: Score(float(len(text)))), tmp_path / damage
        cached(scorer, folder).score(items)
        content = bytearray((folder / "scores.sqlite").read_bytes())
        if damage == "text":
            content[:] = b"this is no database, but long enough to look at" * 10
        else:
            content[4096:] = b"\xff" * (len(content) - 4096)
        (folder / "scores.sqlite").write_bytes(content)
        with caplog.at_level(logging.WARNING):
            assert values(cached(scorer, folder).score(items)) == [float(n) for n in range(300)]
        assert "is damaged (" in caplog.text and f"{folder}/scores.sqlite.damaged" in caplog.text
        assert (folder / "scores.sqlite.damaged").read_bytes() == bytes(content)
        cached(scorer, folder).score(items)
        assert len(scorer.asked) == 2
    record(
        "kept scores damaged",
        "text in place of scores.sqlite; its pages overwritten",
        lost="the kept scores, which are asked for again; the file is set aside",
    )


@pytest.mark.fault
@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("high", "{}"),
        (b"1", "{}"),
        (float("inf"), "{}"),
        (1.0, "7"),
        (1.0, "[1]"),
        (1.0, '{"a": "b"}'),
        (1.0, '{"a": null}'),
        (1.0, "half {"),
        (1.0, b"\xff"),
        (1.0, 7),
    ],
)
def test_a_kept_score_of_the_wrong_type_is_refused(
    value: object, parts: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = table(a=1.0)
    cached(scorer, tmp_path).score(of_prompt("p", "a"))
    with closing(sqlite3.connect(tmp_path / "scores.sqlite")) as connection, connection:
        connection.execute("UPDATE scores SET value = ?, parts = ?", (value, parts))
    assert cached(scorer, tmp_path).score(of_prompt("p", "a")) == [Score(1.0)]
    assert "is damaged (a score is kept as (" in caplog.text and "scores.sqlite.damaged" in caplog.text
    assert len(scorer.asked) == 2
    record("kept scores of the wrong type", "a row of scores.sqlite", lost="the kept scores, which are asked for again")


def test_a_file_that_cannot_be_used_is_told_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ScorerError, match="cannot be read or written .*cache option, or set that to null"):
        ScoreCache(tmp_path / "file" / "scores.sqlite")
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE scores (name TEXT)")
    with pytest.raises(ScorerError, match="no such column"):
        ScoreCache(other)


def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"

    def write(writer: int) -> None:
        cache = ScoreCache(path)
        for n in range(20):
            cache.put({b"%d" % n: Score(float(n)), b"%d-%d" % (writer, n): Score(float(writer))})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    found = ScoreCache(path).get(
        [b"%d" % n for n in range(20)] + [b"%d-%d" % (w, n) for w in range(4) for n in range(20)]
    )
    assert len(found) == 100 and found[b"7"] == Score(7.0) and found[b"3-19"] == Score(3.0)


def test_more_keys_than_a_query_takes(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores.sqlite")
    keys = [b"%d" % n for n in range(1203)]
    cache.put({key: Score(0.5) for key in keys})
    assert cache.get(keys).keys() == set(keys)


@pytest.mark.parametrize(
    ("operational", "decisive"),
    [
        (
            {"batch_size": 1, "timeout_s": 1, "max_unscored": 1, "cache": None, "concurrency": 1},
            {"criterion": "Short."},
        ),
        ({"retries": 0, "api_key_env": "K", "canaries": False, "price_in": 1, "price_out": 1}, {"temperature": 1}),
    ],
)
def test_only_what_decides_a_score_makes_another_scorer(operational: dict[str, Any], decisive: dict[str, Any]) -> None:
    judge = {"base_url": "http://h/v1", "model": "m"}
    first = identity(JudgeScoringBlock.model_validate(judge))
    assert identity(JudgeScoringBlock.model_validate(judge | operational)) == first
    assert identity(JudgeScoringBlock.model_validate(judge | decisive)) != first
    assert len({first, identity(VerifierScoringBlock()), identity(HttpScoringBlock(url="http://h/"))}) == 3


def test_the_code_that_decides_a_score_is_where_its_kind_says() -> None:
    files = [file for file in Path(scoring.__file__).parent.glob("*.py") if "\nKIND: " in file.read_text()]
    assert {file.stem for file in files} >= {"http_service", "implicit", "judge", "reward_model", "verifier"}
    named = {file: import_module(f"raylign.scoring.{file.stem}").KIND.code for file in files}
    assert [name for file, code in named.items() for name in code if not file.with_name(name).is_file()] == []


def test_a_changed_function_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "changing_scores.py"
    for value in (1.0, 2.0):
        # Python would take bytecode of the same second for this source if that were as long.
        longer = "#" * int(value)
        source.write_text(f"def f(prompts, completions): return [{value}] * len(completions)\n\n{longer} {value}")
        for hits in (0, 1):
            scorer = load_scorer(FunctionScoringBlock(function="changing_scores:f"), tmp_path / "scores.sqlite")
            assert values(scorer.score(of_prompt("p", "a"))) == [value]
            assert scorer.take_usage()["function"].cache_hits == hits
            scorer.close()


def test_the_option_says_where_scores_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, shared = tmp_path / "run" / "scores.sqlite", tmp_path / "shared.sqlite"
    with serving(honest) as server:
        for option, made in ((None, False), (shared, True), ("run", True)):
            block = JudgeScoringBlock.model_validate(
                {"base_url": server.base_url, "model": "m", "canaries": False, "cache": option}
            )
            for _ in range(2):
                assert values(load_scorer(block, run).score(of_prompt("p", "good", "bad"))) == [1.0, 0.0]
            assert (run if option == "run" else shared).exists() == made
    assert len(server.asked) == 2 * 3 + 3 + 3, "a reply to meet the judge, and both orders"
