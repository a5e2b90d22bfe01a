"""Scoring with a function in a child process: values, faults, deadlines, isolation."""

import hashlib
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from raylign.boundary.code import is_inside, trusted_roots
from raylign.config.scoring import FunctionScoringBlock
from raylign.errors import ScorerError
from raylign.records import Prompt, Score
from raylign.scoring.base import ScoringItem, check_unscored, most_unscored
from raylign.scoring.function import FunctionScorer, describe_function
from raylign.scoring.process import START_TIMEOUT_S, Given, ScoringProcess, child_environment
from raylign.scoring.vader import compound
from tests.faults import record
from tests.processes import alive

HERE = Path(__file__).parents[1]
T = TypeVar("T")
Make = Callable[..., FunctionScorer]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Scorers over the functions of user_scores.py, closed at the end."""
    (tmp_path / "broken_scores.py").write_text("raise RuntimeError('no weights')")
    (tmp_path / "needy_scores.py").write_text("import package_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(HERE))
    scorers: list[FunctionScorer] = []

    def _make(function: str, batch_size: int = 4, timeout_s: float = 5.0, max_unscored: float = 1.0) -> FunctionScorer:
        block = FunctionScoringBlock(
            function=f"user_scores:{function}", batch_size=batch_size, timeout_s=timeout_s, max_unscored=max_unscored
        )
        scorers.append(FunctionScorer(block))
        return scorers[-1]

    yield _make
    for scorer in scorers:
        scorer.close()


def items(*completions: str) -> list[ScoringItem]:
    return [
        ScoringItem(Prompt(f"p{i}", ({"role": "user", "content": str(i)},), (1,)), completion)
        for i, completion in enumerate(completions)
    ]


def values(scores: list[Score]) -> list[float | None]:
    return [score.value for score in scores]


def wait_for(condition: Callable[[], T], seconds: float = 300.0) -> T:
    """The first true value of `condition`, or its last one when time is up."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


def test_scores_keep_the_order_over_batches(make: Make) -> None:
    assert values(make("prompt_and_completion", batch_size=2).score(items("3", "1", "2", "5", "4"))) == [
        3,
        11,
        22,
        35,
        44,
    ]


def test_printing_does_not_disturb_the_answers(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    assert values(make("length").score(items("", "ab", "\ud800é"))) == [0, 2, 2]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "to stdout" in captured.err


def test_a_function_may_give_parts_and_a_reason_of_its_own(make: Make) -> None:
    scores = make("detailed").score(items("a", "mute", "silent", "bad", "told"))
    assert scores[0] == Score(1.0, {"length": 1.0})
    assert scores[4] == Score(1.0, {"length": 4.0}, "two lines")
    assert scores[1] == Score(None, {"length": 4.0}, "nothing to say")
    assert scores[2] == Score(None, {"length": 6.0}, "scorer returned None")
    assert scores[3] == Score(None, {"length": 3.0}, "returned nan")


def test_the_scoring_process_loads_no_model_library() -> None:
    heavy = ("torch", "transformers", "sympy", "numpy", "pydantic", "httpx", "detect_secrets")
    code = f"import sys, raylign.scoring.worker; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"


def test_no_items_give_no_scores(make: Make) -> None:
    assert make("length").score([]) == []


def test_values_that_are_no_numbers_are_unscored_with_a_reason(make: Make) -> None:
    scores = make("picky", batch_size=8).score(items("1", "none", "nan", "inf", "text", "bool", "2"))
    assert values(scores) == [1.0, None, None, None, None, None, 2.0]
    assert [score.reason for score in scores] == [
        "",
        "scorer returned None",
        "returned nan",
        "returned -inf",
        "returned 'abc', not a number",
        "returned True, not a number",
        "",
    ]


@pytest.mark.parametrize(("function", "expected"), [("arrays", [0.0, 1.0]), ("numpy_scalars", [0.5, 2.0])])
def test_numpy_results_are_accepted(make: Make, function: str, expected: list[float]) -> None:
    assert values(make(function).score(items("a", "b"))) == expected


def test_a_result_that_is_no_list_is_refused(make: Make) -> None:
    scores = make("scalar").score(items("a", "b"))
    assert [score.reason for score in scores] == ["returned 0.5, not a list of scores"] * 2


def test_only_the_raising_item_is_unscored(make: Make) -> None:
    scores = make("raising").score(items("a", "bad", "b", "c", "d"))
    assert values(scores) == [1.0, None, 1.0, 1.0, 1.0]
    assert scores[1].reason == r"ValueError: cannot read 'bad' \x1b[31m"


def test_only_the_miscounted_item_is_unscored(make: Make) -> None:
    scores = make("miscounting").score(items("a", "bad", "b"))
    assert values(scores) == [1.0, None, 1.0]
    assert scores[1].reason == "returned 2 scores for 1 completions"


@pytest.fixture
def deadlines(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of each request; those without a "bad" item, which do not hang, get all the time that a slow machine takes."""
    found, ask = list[float](), ScoringProcess.ask

    def patient(self: ScoringProcess, request: Mapping[str, Any], timeout_s: float) -> list[Given]:
        found.append(timeout_s)
        return ask(self, request, timeout_s if "bad" in request["arguments"][1] else START_TIMEOUT_S)

    monkeypatch.setattr(ScoringProcess, "ask", patient)
    return found


def test_a_hang_ends_at_its_deadline_and_the_others_are_scored(make: Make, deadlines: list[float]) -> None:
    scorer = make("hanging", timeout_s=0.5, batch_size=3)
    before = scorer.score(items("a"))[0].value
    scores = scorer.score(items("a", "bad", "b"))
    assert deadlines == [0.5, 1.5, 0.5, 0.5, 0.5], "one item, three in a batch, each of them alone"
    assert scores[1] == Score(None, reason="no answer within 0.5 s")
    first, last = scores[0].value, scores[2].value
    assert before is not None and first is not None and last is not None
    assert len({before, first, last}) == 3, "each hang costs the process"
    assert not alive(int(before)) and not alive(int(first)) and alive(int(last))


def test_a_dying_process_names_its_end_and_is_replaced(make: Make) -> None:
    scores = make("exiting").score(items("a", "bad", "worse", "b"))
    assert values(scores) == [1.0, None, None, 1.0]
    assert scores[1].reason == "the scoring process exited with code 3"
    assert scores[2].reason == "the scoring process was killed by SIGSEGV"


def test_processes_that_user_code_started_die_with_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, receive = tmp_path / "pid", ScoringProcess._receive
    scorer = make("spawning", timeout_s=0.5)

    def once_started(self: ScoringProcess, timeout_s: float) -> bytes:
        assert wait_for(lambda: note.exists() and note.read_text())
        return receive(self, timeout_s)

    monkeypatch.setattr(ScoringProcess, "_receive", once_started)
    score = scorer.score(items(str(note)))[0]
    assert score.reason == "no answer within 0.5 s"
    worker, child = map(int, note.read_text().split())
    assert not alive(worker)
    assert wait_for(lambda: not alive(child))


def test_no_process_outlives_a_killed_parent(make: Make, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = textwrap.dedent(f"""\
        import sys
        sys.path[:0] = {sys.path!r}
        from raylign.config.scoring import FunctionScoringBlock
        from raylign.records import Prompt
        from raylign.scoring.base import ScoringItem
        from raylign.scoring.function import FunctionScorer
        scorer = FunctionScorer(FunctionScoringBlock(function="user_scores:spawning"))
        scorer.score([ScoringItem(Prompt("p", (), (1,)), {str(note)!r})])
    """)
    parent = subprocess.Popen([sys.executable, "-c", script])
    pids = [int(pid) for pid in wait_for(lambda: note.read_text().split() if note.exists() else [])]
    parent.kill()
    parent.wait()
    assert wait_for(lambda: not any(alive(pid) for pid in pids))


def test_scoring_stops_once_too_many_are_unscored(make: Make) -> None:
    scores = make("raising", batch_size=1, max_unscored=0.2).score(items(*["bad"] * 4, *["a"] * 6))
    assert values(scores) == [None] * 10
    assert [score.reason.split(":")[0] for score in scores] == ["ValueError"] * 3 + ["skipped"] * 7
    assert scores[-1].reason == "skipped: more than 20% of items already unscored"


def test_the_limit_itself_is_allowed(make: Make) -> None:
    scores = make("raising", batch_size=1, max_unscored=0.29).score(items(*["bad"] * 29, *["a"] * 71))
    assert values(scores) == [None] * 29 + [1.0] * 71
    check_unscored(scores, 0.29)


def test_a_part_of_the_items_may_use_up_what_the_whole_may_lose(make: Make) -> None:
    scorer = make("raising", batch_size=1, max_unscored=0.2)
    assert values(scorer.score(items("bad", "bad", "a", "b"), allowed=2)) == [None, None, 1.0, 1.0]
    assert values(scorer.score(items("bad", "a"), allowed=0)) == [None, None]


@pytest.mark.parametrize(
    ("total", "limit", "most"), [(100, 0.29, 29), (10, 0.2, 2), (10, 0.3, 3), (3, 0.5, 1), (7, 1.0, 7), (0, 0.5, 0)]
)
def test_most_unscored_is_the_largest_share_within_the_limit(total: int, limit: float, most: int) -> None:
    assert most_unscored(total, limit) == most


def test_secrets_stay_with_the_parent_and_code_runs_in_the_main_thread(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "x")
    assert values(make("main_thread").score(items("a"))) == [0.0]


def test_child_environment_drops_secret_names_and_carries_the_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["HF_TOKEN", "aws_secret_access_key", "MLFLOW_TRACKING_PASSWORD", "AUTHORIZATION", "API_KEY", "HOME"]
    environment = child_environment(dict.fromkeys(names, "x") | {"PYTHONPATH": "/old"}, ["/a", ""])
    assert environment == {"HOME": "x", "PYTHONPATH": f"/a{os.pathsep}{tmp_path}{os.pathsep}{tmp_path}"}


def test_close_ends_the_process_and_a_later_call_starts_another(make: Make) -> None:
    scorer = make("hanging")
    first = scorer.score(items("a"))[0].value
    scorer.close()
    scorer.close()
    assert first is not None and not alive(int(first))
    assert scorer.score(items("a"))[0].value not in (None, first)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("user_scorez:length", "no module 'user_scorez' .*; did you mean 'user_scores'?"),
        ("raylign.scoring.vadr:compound", "no module 'raylign.scoring.vadr' .*; did you mean 'raylign.scoring.vader'?"),
        ("user_scores:lenght", "module 'user_scores' has no 'lenght'; did you mean 'length'?"),
        ("user_scores:VALUE", "'VALUE' is a int, not a function"),
        ("user_scores.length:x", "no module 'user_scores.length'"),
        ("broken_scores:f", "cannot be loaded: RuntimeError: no weights"),
        ("needy_scores:f", "module 'needy_scores' needs 'package_nobody_has', which is not installed"),
    ],
)
def test_what_cannot_be_loaded_is_refused_at_once(make: Make, spec: str, message: str) -> None:
    with pytest.raises(ScorerError, match=message.replace("?", r"\?")):
        FunctionScorer(FunctionScoringBlock(function=spec))


def test_describe_function_gives_file_hash_and_line(make: Make) -> None:
    source = (HERE / "user_scores.py").read_text()
    info = describe_function("user_scores:length")
    assert info.file == HERE / "user_scores.py"
    assert info.sha256 == hashlib.sha256(source.encode()).hexdigest()
    assert source.splitlines()[info.line - 1].startswith("def length(")


def test_describe_function_refuses_what_is_not_a_name() -> None:
    with pytest.raises(ScorerError, match="not of the form module:function"):
        describe_function("json.loads")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, beside a folder `elsewhere` on the import path whose modules leave a mark."""
    elsewhere, project = tmp_path / "elsewhere", tmp_path / "project"
    (elsewhere / "boxed").mkdir(parents=True)
    project.mkdir()
    body = f"open({str(tmp_path / 'mark')!r}, 'w').close()\n\n\ndef score(prompts, completions): ...\n"
    for name in ("foreign_scores.py", "boxed/__init__.py", "boxed/inner.py"):
        (elsewhere / name).write_text(body)
    monkeypatch.syspath_prepend(str(elsewhere))
    monkeypatch.chdir(project)
    return project


@pytest.mark.fault
def test_a_scorer_from_outside_the_project_is_refused_before_it_runs(project: Path) -> None:
    outside = project.parent / "elsewhere"
    (project / "linked_scores.py").symlink_to(outside / "foreign_scores.py")
    for spec, file in (
        ("foreign_scores:score", "foreign_scores.py"),
        ("boxed.inner:score", "boxed/__init__.py"),
        ("linked_scores:score", "foreign_scores.py"),
    ):
        with pytest.raises(ScorerError) as caught:
            describe_function(spec)
        text = str(caught.value)
        assert f"scoring.function={spec}" in text and f"{outside / file} is outside the project ({project})" in text
        assert text.endswith("set scoring.allow_outside=true")
    assert not (project.parent / "mark").exists(), "code from outside was run"
    record("scorer module outside the project", "a module on PYTHONPATH, in a package, behind a link", lost="nothing")


def test_an_outside_scorer_runs_when_it_is_allowed(project: Path) -> None:
    info = describe_function("foreign_scores:score", allow_outside=True)
    assert info.file == project.parent / "elsewhere/foreign_scores.py"
    assert (project.parent / "mark").exists()


def test_a_function_that_the_project_takes_from_outside_is_refused(project: Path) -> None:
    (project / "mine.py").write_text("from foreign_scores import score\n")
    with pytest.raises(ScorerError, match=r"foreign_scores\.py is outside the project"):
        describe_function("mine:score")


def test_scorers_of_the_project_and_of_installed_packages_are_taken(project: Path) -> None:
    (project / "tools").mkdir()
    (project / "tools/mine.py").write_text("def score(prompts, completions): ...\n")
    assert describe_function("tools.mine:score").file == project / "tools/mine.py"
    assert describe_function("raylign.scoring.vader:compound").line > 1
    assert describe_function("yaml:safe_load").file.parent.name == "yaml"


def test_editable_checkouts_count_as_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = tmp_path / "site/judges-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Name: judges\nVersion: 1.0\n")
    (facts / "direct_url.json").write_text(
        f'{{"url": "{(tmp_path / "my judges").as_uri()}", "dir_info": {{"editable": true}}}}'
    )
    judge = str(tmp_path / "my judges/judges/score.py")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert not is_inside(judge, trusted_roots(tmp_path / "project")), "PYTHONPATH names what it likes"
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path / "site")])
    roots = trusted_roots(tmp_path / "project")
    assert is_inside(judge, roots)
    assert not is_inside(str(tmp_path / "my judges.py"), roots)


def test_check_unscored_tells_share_limit_reasons_and_cure() -> None:
    scores = [Score(1.0)] * 4 + [Score(None, reason="late")] * 4 + [Score(None, reason="nan")] * 2
    check_unscored(scores, 0.6)
    check_unscored([], 0.0)
    with pytest.raises(ScorerError) as caught:
        check_unscored(scores, 0.5)
    text = str(caught.value)
    assert "6 of 10 completions (60%)" in text and "max_unscored=0.5 allows 50%" in text
    assert text.index("4 x late") < text.index("2 x nan")
    assert "raise scoring.timeout_s" in text


def test_vader_gives_its_compound_score() -> None:
    # VADER's lexicon has great 3.1; compound = s / sqrt(s^2 + 15), Hutto and Gilbert 2014.
    expected = round(3.1 / (3.1**2 + 15) ** 0.5, 4)
    assert compound([[], [], []], ["great", "", "table"]) == [expected, 0.0, 0.0]
