"""Which prompts may promote a policy version, on run directories made by hand."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raylign.config import EvaluateConfig, OnlineDpoConfig, load_recipe
from raylign.config.evaluate import RunSideBlock
from raylign.errors import ConfigError
from raylign.evaluation.evidence import Version, evaluated_evidence, own_evidence
from raylign.evaluation.gate import Evidence, Refusal
from raylign.records import Prompt
from raylign.run.directory import RunDirectory
from tests.promoted import WEIGHTS, add_round, evaluate, new_run, offline_run, run_config

NEW = [f"Never asked {number}?" for number in range(20)]


class Bench:
    """A run of two rounds: version 1 wins half of the held-out prompts over version 0, and version 2 all of them."""

    def __init__(self, parent: Path, **blocks: Any) -> None:
        self.parent = parent
        self.config: OnlineDpoConfig = run_config(parent, **blocks)
        self.run: RunDirectory = new_run(self.config)
        add_round(self.run, 1, [1.0] * 10 + [-1.0] * 10)
        add_round(self.run, 2, [2.0] * 20)

    def version(self, number: int) -> Version:
        return Version(self.run.path, "c", number)

    def told(self, number: int) -> str:
        return f"version {number} of {self.run.path}"

    def own(self, number: int = 2, other: Version | None = None) -> Evidence | Refusal:
        report = self.run.finished_round(number)
        return own_evidence(self.run, self.config, report, self.version(number), other or self.version(0))

    def evaluation(self, policy: str = "", against: str = "", questions: list[str] | None = None) -> Path:
        asked = NEW if questions is None else questions
        policy, against = policy or self.told(2), against or self.told(0)
        return evaluate(self.parent, policy, against, asked, 18, self.run.checkpoint(2))

    def evaluated(self, path: Path, number: int = 2, other: Version | None = None) -> Evidence | Refusal:
        return evaluated_evidence(path, self.run, self.config, self.version(number), other or self.version(0))


def refusal(found: Evidence | Refusal) -> Refusal:
    assert isinstance(found, Refusal), found
    return found


def evidence(found: Evidence | Refusal) -> Evidence:
    assert isinstance(found, Evidence), found
    return found


def test_the_newest_version_is_measured_on_its_own_held_out_prompts(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    found = evidence(bench.own())
    assert (found.rate, found.prompts, found.confidence, found.against) == (1.0, 20, 0.95, "the initial policy")
    assert 0.5 < found.low < 1.0
    over_champion = evidence(bench.own(other=bench.version(1)))
    assert over_champion.rate == 1.0 and over_champion.against == f"the champion, version 1 of {bench.run.path}"


def test_the_interval_is_that_of_the_version_and_opponent(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    add_round(bench.run, 3, [1.0] * 10 + [3.0] * 8 + [None] * 2)  # of 18 that are scored 10 lost to version 2
    found = evidence(bench.own(3, bench.version(2)))
    assert found.rate == pytest.approx(8 / 18) and found.prompts == 18 and found.low < 0.5


def test_the_cure_is_a_command_that_a_shell_and_the_recipe_take(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "a folder")
    words = shlex.split(refusal(bench.own(1)).cure.partition(": ")[2])
    assert words[:2] == ["raylign", "run"]
    config = load_recipe(Path(words[2]), words[3:])
    assert isinstance(config, EvaluateConfig)
    assert config.policy == RunSideBlock(run=bench.run.path, version=1)
    assert list(config.opponents.values()) == [RunSideBlock(run=bench.run.path, version=0)]


def test_held_out_prompts_that_chose_are_refused(tmp_path: Path) -> None:
    for name, block in {
        "best": {"metric_for_best_model": "score"},
        "early": {"metric_for_best_model": "score", "early_stopping_patience": 2},
    }.items():
        bench = Bench(tmp_path / name, evaluation=block)
        found = refusal(bench.own())
        assert found.condition == "unused prompts" and "evaluation.metric_for_best_model=score" in found.found
        assert f"policy={{type: run, run: {bench.run.path}, version: 2}}" in found.cure
        assert "--evaluation RUN" in found.cure
        assert evidence(bench.evaluated(bench.evaluation())).rate == 0.9, "other prompts will do"


def test_a_version_that_somebody_picked_needs_other_prompts(tmp_path: Path) -> None:
    assert "picked with the scores of 2 versions in view" in refusal(Bench(tmp_path).own(1)).found


def test_a_champion_of_another_run_needs_other_prompts(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    other = Version(tmp_path / "elsewhere", "other", 3)
    assert "of another run and has not answered the held-out prompts" in refusal(bench.own(other=other)).found
    path = bench.evaluation(against=f"version 3 of {tmp_path / 'elsewhere'}")
    assert evidence(bench.evaluated(path, other=other)).against.startswith("the champion, version 3 of ")


def test_an_evaluation_on_other_prompts_will_do(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    found = evidence(bench.evaluated(bench.evaluation()))
    assert (found.rate, found.prompts) == (0.9, 20) and found.where.endswith("by gold")
    against_model = bench.evaluation(against=bench.config.model.path)
    assert evidence(bench.evaluated(against_model)).rate == 0.9, "the initial policy is the model it began with"


@pytest.mark.parametrize(
    ("make", "condition", "found"),
    [
        (lambda bench: bench.evaluation(policy=bench.told(1)), "evaluation", "not of version 2"),
        (lambda bench: bench.evaluation(policy="embedded:smollm2-135m"), "evaluation", "not of version 2"),
        (lambda bench: bench.evaluation(policy="version 2 of /elsewhere"), "evaluation", "not of version 2"),
        (lambda bench: bench.evaluation(against=bench.told(1)), "evaluation", "not with the initial policy"),
        (lambda bench: bench.evaluation(questions=[*NEW, "Held out 3?"]), "unused prompts", "1 of its prompts"),
        (lambda bench: bench.evaluation(questions=[*NEW, "Train 1?", "Train 2?"]), "unused prompts", "2 of its"),
        (lambda bench: bench.evaluation(questions=[*NEW, "Be brief.|held   OUT 3?\n"]), "unused prompts", "1 of its"),
    ],
)
def test_an_evaluation_of_something_else_is_refused(
    tmp_path: Path, make: Callable[[Bench], Path], condition: str, found: str
) -> None:
    bench = Bench(tmp_path)
    refused = refusal(bench.evaluated(make(bench)))
    assert refused.condition == condition and found in refused.found and "--evaluation RUN" in refused.cure


def test_a_run_on_a_data_set_is_promoted_by_an_evaluation_on_prompts_that_it_has_not_read(tmp_path: Path) -> None:
    config, run = offline_run(tmp_path)
    mine, initial = Version(run.path, "c", 1), Version(run.path, "c", 0)
    own = refusal(own_evidence(run, config, run.finished_round(1), mine, initial))
    assert own.condition == "unused prompts" and "a run of the recipe offline_dpo" in own.found
    assert f"policy={{type: run, run: {run.path}, version: 1}}" in own.cure and "--evaluation RUN" in own.cure
    path = evaluate(tmp_path, f"version 1 of {run.path}", f"version 0 of {run.path}", NEW, 18, run.checkpoint(1))

    def asked(text: str) -> Evidence | Refusal:
        rows = [Prompt("t", ({"role": "user", "content": text},), (1,))]
        return evaluated_evidence(path, run, config, mine, initial, rows)

    assert evidence(asked("Read in training?")).rate == 0.9
    assert "1 of its prompts were asked by the run too" in refusal(asked("never  ASKED 3?")).found


def test_an_evaluation_of_weights_that_were_trained_again_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    path = bench.evaluation()
    with bench.run.checkpoint_store(None).new(2, (), True, 0) as folder:
        (folder / WEIGHTS).write_bytes(b"others")
    assert "of other weights" in refusal(bench.evaluated(path)).found


def test_what_is_no_finished_evaluation_is_an_error(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with pytest.raises(ConfigError, match="run of the recipe online_dpo; give one of evaluate"):
        bench.evaluated(bench.run.path)
    path = bench.evaluation()
    (path / "report.json").unlink()
    with pytest.raises(ConfigError, match="is not finished; go on with it: raylign resume"):
        bench.evaluated(path)
