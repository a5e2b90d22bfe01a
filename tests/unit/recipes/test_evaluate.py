"""The recipe that compares, over the roles of tests.fakes: version v answers with v times "good", which scores v."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raylign.config import EvaluateConfig, dump_config
from raylign.config.blocks import ModelBlock
from raylign.config.load import parse_tree
from raylign.errors import ConfigError
from raylign.evaluation.comparison import Comparison
from raylign.prompts import PromptSet
from raylign.records import Candidate, Prompt
from raylign.report.measures import chart_name
from raylign.report.win_rates import win_rate_table
from raylign.roles import Generators, Scorer
from raylign.run.directory import continue_or_create
from raylign.tracking.journal import JOURNAL_NAME, Journal, read_events
from raylign.tracking.tracker import Tracker
from recipes.evaluate import REPORT, compared
from recipes.run import Run
from recipes.sides import Found
from tests.fakes import FakeEngine, FakeGenerators, FakeScorer, NoFeed, count_good

PROMPTS = tuple(
    Prompt(name, ({"role": "user", "content": name},), (1, 2), {"kind": kind})
    for name, kind in (("a", "math"), ("b", "art"), ("c", "math"))
)
Judge = Callable[[Prompt, str], float | None]


class Killed(Exception):
    """In the place of a signal."""


def side(name: str, version: int, *texts: str) -> Found:
    """A run's policy, or given answers."""
    given = tuple(
        Candidate(prompt.id, 0, (1,) * len(text.split()), (), text, "stop", 0, 0)
        for prompt, text in zip(PROMPTS, texts, strict=False)
    )
    told = f"version {version}" if not texts else "given"
    return Found(name, told, "here", ModelBlock(), None, version, PromptSet((), PROMPTS, "s", "0"), given or None)


@dataclass
class Bench:
    """A run directory, whoever answers, and what was asked of them."""

    config: EvaluateConfig
    value: Judge = count_good
    events: list[str] = field(default_factory=list)
    dies_at: str = ""

    def compare(self, *sides: Found) -> Comparison:
        directory = continue_or_create(self.config)
        journal = Journal(directory.path / JOURNAL_NAME)
        try:
            run = Run(self.config, directory, Tracker(journal, NoFeed()), Console(file=io.StringIO(), width=200))
            return compared(run, sides, self.serve, self.scoring, self.config)
        finally:
            journal.close()

    def serve(self, one: Found) -> Generators:
        if one.name == self.dies_at:
            raise Killed
        engine = FakeEngine(self.events)
        engine.weights = engine.label_now = one.version
        return FakeGenerators([engine])

    @contextmanager
    def scoring(self) -> Iterator[Scorer]:
        yield FakeScorer(self.events, self.config.scoring, self.value)


def config_of(tmp_path: Path, **changes: Any) -> EvaluateConfig:
    raw = {"run": {"dir": str(tmp_path)}, "evaluation": {"category": "kind"}} | changes
    return parse_tree(raw, EvaluateConfig, "test")


def test_a_policy_against_a_version_and_given_answers(tmp_path: Path) -> None:
    bench = Bench(config_of(tmp_path))
    found = bench.compare(side("policy", 2), side("initial", 0), side("given", 0, "good " * 3, "good good", "none"))
    initial, given = found.opponents["initial"], found.opponents["given"]
    assert (initial.against, initial.overall.rate, initial.overall.prompts) == ("version 0", 1.0, 3)
    assert given.overall.rate == pytest.approx(0.5)  # a loss, a tie and a win
    assert {name: one.rate for name, one in given.categories.items()} == {"math": 0.5, "art": 0.5}
    assert (found.evaluation.score, found.evaluation.length, found.evaluation.win_rate) == (2.0, 3.0, 1.0)
    assert bench.events == [*["sample a", "sample b", "sample c"] * 2, *["score 3"] * 3]
    assert REPORT.validate_json(REPORT.dump_json(found)) == found


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    bench = Bench(config_of(tmp_path), dies_at="initial")
    sides = side("policy", 1), side("initial", 0)
    with pytest.raises(Killed):
        bench.compare(*sides)
    assert bench.events == ["sample a", "sample b", "sample c"]
    bench.dies_at = ""
    first = bench.compare(*sides)
    assert bench.events.count("sample a") == 2 and bench.events[-2:] == ["score 3", "score 3"]
    asked = len(bench.events)
    assert bench.compare(*sides) == first and len(bench.events) == asked


def test_a_judge_sees_two_answers_at_a_time(tmp_path: Path) -> None:
    """Both answers of a pair come as one prompt's; the fake prefers the longer one, but for prompt c, a tie."""
    judge = {"type": "judge", "base_url": "http://127.0.0.1:1/v1", "model": "m"}

    def longer(prompt: Prompt, text: str) -> float:
        return 0.5 if prompt.id.startswith("c") else len(text) / 100

    bench = Bench(config_of(tmp_path, scoring=judge), value=longer)
    found = bench.compare(side("policy", 2), side("initial", 0))
    assert found.opponents["initial"].overall.rate == pytest.approx(5 / 6)
    assert bench.events[-2:] == ["score 3", "score 6"]


def test_what_the_journal_and_the_folder_have(tmp_path: Path) -> None:
    bench = Bench(config_of(tmp_path))
    bench.compare(side("policy", 2), side("initial", 0))
    folder = tmp_path / "evaluate"
    (event,) = [event for event in read_events(folder / JOURNAL_NAME) if event.name == "evaluation"]
    assert event.payload["evaluation"]["win_rate"] == 1.0 and event.payload["evaluation"]["score"] == 2.0
    names = {path.name for path in (folder / "rounds/0000").iterdir()}
    assert {"sampled.jsonl", "sampled-1.jsonl", "candidates.parquet", "candidates-1.parquet", "report.json"} <= names
    assert json.loads((folder / "rounds/0000/report.json").read_text())["evaluation"]["completions"] == 3


def test_every_opponents_rate_is_measured(tmp_path: Path) -> None:
    bench = Bench(config_of(tmp_path))
    bench.compare(side("policy", 2), side("initial", 0), side("given", 0, "good " * 3, "good good", "none"))
    (event,) = [event for event in read_events(tmp_path / "evaluate" / JOURNAL_NAME) if event.name == "evaluation"]
    found = event.payload["evaluation"]
    assert (found["win_rate"], found["win_rate/initial"], found["win_rate/given"]) == (1.0, 1.0, 0.5)
    assert found["win_rate_low/given"] < 0.5 < found["win_rate_high/given"]
    assert chart_name("win_rate_low/given") == "eval/win_rate_low/given"


def test_the_table_has_opponents_and_their_categories(tmp_path: Path) -> None:
    found = Bench(config_of(tmp_path)).compare(side("policy", 2), side("initial", 0))
    file = io.StringIO()
    Console(file=file, width=120).print(win_rate_table(found))
    rows = [line.split() for line in file.getvalue().splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("initial", "math", "art")] == ["initial", "math", "art"]
    (row,) = [row for row in rows if row[:1] == ["initial"]]
    assert row[1:3] == ["3", "100.0"] and row[-3:] == ["100.0", "0.0", "0.0"]


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"evaluation": {"max_new_tokens": 1024}}, "evaluation.max_new_tokens=1024 leaves no room for a prompt"),
        ({"model": {"lora": {}}}, "nothing is trained here"),
        ({"trainer": {"learning_rate": 1e-3, "ranks": 2}}, "trainer.ranks, trainer.learning_rate: nothing is trained"),
        ({"scoring": {"type": "human"}}, "raylign review send RUN"),
        ({"model": {"path": "/x"}}, "whose answers are evaluated is said by policy and opponents"),
        ({"opponents": {}}, "at least 1"),
        ({"opponents": {"a b": {"type": "model"}}}, "opponents"),
        ({"policy": {"type": "runs"}}, "policy.type: unknown value 'runs'; did you mean 'run'?"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, **changes)
    assert refusal in str(error.value)


def test_its_config_reads_back(tmp_path: Path) -> None:
    config = config_of(tmp_path, opponents={"first": {"type": "run", "run": "/r", "version": 0}})
    assert config.rounds == 0 and "version: 0" in dump_config(config)
