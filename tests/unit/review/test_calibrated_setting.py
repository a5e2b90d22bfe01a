"""What people answered becomes a setting that a run can take as it is printed."""

import io
import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from scipy.special import expit

from raylign.config import OnlineDpoConfig, parse_config
from raylign.config.scoring import CalibratedScoringBlock
from raylign.records import Candidate, Prompt, Score
from raylign.review.record import Answer, Said, pair_of
from raylign.review.report import ReviewReport, print_report, review_report, save_report
from raylign.run.directory import RunDirectory
from raylign.run.tables import write_candidates

JUDGE = {"type": "judge", "base_url": "http://h/v1", "model": "m", "criterion": "It's “short”; \x1b\u202e no"}
Parts = Callable[[float], Mapping[str, float]]


def reported(folder: Path, config: OnlineDpoConfig, parts: Parts, count: int = 120, slope: float = 2.0) -> ReviewReport:
    """Of `count` prompts with two answers: people decide by a number of each, of which `parts` makes the scores."""
    generator = np.random.default_rng(1)
    prompts, candidates, scores, pairs, answers = [], [], [], [], []
    for number in range(count):
        prompt = Prompt(f"p{number}", ({"role": "user", "content": "?"},), (1,))
        qualities = [float(value) for value in generator.normal(size=2)]
        texts = (f"{number} a", f"{number} b")
        for index, (text, quality) in enumerate(zip(texts, qualities, strict=True)):
            candidates.append(Candidate(prompt.id, index, (1,), (0.0,), text, "stop", 0, 0))
            found = dict(parts(quality))
            scores.append(Score(found.pop(""), found))
        pair = pair_of("run", 1, (prompt.id, prompt.messages), texts, by="random", seed=0)
        first = generator.random() < expit(slope * (qualities[0] - qualities[1]))
        prompts.append(prompt)
        pairs.append(pair)
        answers.append(Answer(pair.id, "ann", "first" if first else "second", "", number))
    write_candidates(folder / "rounds/0001/candidates.parquet", prompts, candidates, scores)
    return review_report(RunDirectory(folder), config.scoring, pairs, Said(tuple(answers)), seed=0)


def printed(report: ReviewReport) -> dict[str, str]:
    """The settings as they stand on the screen, by scorer."""
    out = io.StringIO()
    print_report(report, Console(file=out, width=80))
    found = {}
    for line in out.getvalue().splitlines():
        if line.startswith("to train by "):
            name, _, command = line.removeprefix("to train by ").partition(" as people judge: ")
            (found[name],) = shlex.split(command)
    return found


def loaded(setting: str) -> CalibratedScoringBlock:
    block = parse_config({"scoring": {"type": "human"}}, [setting]).scoring
    assert isinstance(block, CalibratedScoringBlock)
    return block


def test_each_scorer_that_people_bear_out_has_a_setting_that_loads(tmp_path: Path) -> None:
    """Also one of which less is better, and those of a composition of a composition."""
    inner = {"type": "min", "scorers": {"kind": {"type": "function"}, "true": {"type": "verifier"}}}
    scorers = {"quality": inner, "length": {"type": "function", "function": "my_module:length"}}
    scoring = {"type": "weighted", "scorers": scorers, "weights": {"quality": 1.0, "length": -0.5}, "max_unscored": 0.4}

    def parts(q: float) -> Mapping[str, float]:
        return {"": 10 * q, "quality": q, "quality/kind": q, "quality/true": -q, "length": -3 * q}

    config = parse_config({"scoring": scoring})
    report = reported(tmp_path, config, parts)
    found = printed(report)
    assert set(found) == {"score", "quality", "quality/kind", "length"}, "people contradict quality/true"
    judge = report.scorers["quality"].judge
    assert judge is not None and judge.judge.slope == pytest.approx(2.0, rel=0.4)
    for name, setting in found.items():
        block, own = loaded(setting), report.scorers[name]
        assert own.judge is not None and (block.slope, block.band) == (own.judge.judge.slope, own.judge.judge.band)
        assert block.max_unscored == 0.4
    assert loaded(found["score"]).scorer == config.scoring and loaded(found["score"]).slope < judge.judge.slope / 5
    assert loaded(found["quality/kind"]).scorer.type == "function"
    negated = loaded(found["length"]).scorer
    assert (negated.type, negated.model_dump()["weights"]) == ("weighted", {"length": -1.0})
    kept = json.loads(save_report(tmp_path, report).read_text())["scorers"]
    assert {name: own["setting"] is not None for name, own in kept.items()} == {name: name in found for name in kept}
    assert parse_config({"scoring": kept["length"]["setting"]}).scoring == loaded(found["length"])


def test_a_setting_keeps_every_character_of_the_scorers(tmp_path: Path) -> None:
    config = parse_config({"scoring": JUDGE})
    found = printed(reported(tmp_path, config, lambda q: {"": q}))
    assert loaded(found["score"]).scorer == config.scoring
    assert found["score"].isprintable()


def test_a_gate_s_member_is_no_whole(tmp_path: Path) -> None:
    """It is called as the whole is."""
    config = parse_config({"scoring": {"type": "gate", "gate": {"type": "verifier"}, "score": JUDGE}})
    found = printed(reported(tmp_path, config, lambda q: {"": q, "gate": 1.0, "score": q}))
    assert set(found) == {"score"} and loaded(found["score"]).scorer.type == "judge"


@pytest.mark.parametrize(
    ("scoring", "parts"),
    [
        ({"type": "function"}, lambda q: {"": -q}),
        ({"type": "function"}, lambda q: {"": 0.5}),
        ({"type": "human"}, lambda q: {"": q}),
        ({"type": "min", "scorers": {"both": {"type": "min", "scorers": {"people": {"type": "human"}}}}}, None),
    ],
    ids=["contradicted", "says nothing", "people", "people within"],
)
def test_what_people_do_not_bear_out_and_people_themselves_have_none(
    scoring: dict[str, Any], parts: Parts | None, tmp_path: Path
) -> None:
    report = reported(tmp_path, parse_config({"scoring": scoring}), parts or (lambda q: {"": q, "both": q}))
    assert printed(report) == {} and all(own.setting is None for own in report.scorers.values())


def test_the_setting_of_the_guide_loads() -> None:
    guide = (Path(__file__).parents[3] / "recipes/README.md").read_text()
    (block,) = [text for text in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL) if "type: calibrated" in text]
    assert isinstance(parse_config(yaml.safe_load(block)).scoring, CalibratedScoringBlock)


def test_few_answers_make_no_setting(tmp_path: Path) -> None:
    assert printed(reported(tmp_path, parse_config({}), lambda q: {"": q}, count=10)) == {}


def test_a_calibrated_run_has_the_setting_of_its_scorer_anew(tmp_path: Path) -> None:
    config = parse_config({"scoring": {"type": "calibrated", "slope": 9.0, "scorer": {"type": "verifier"}}})
    found = printed(reported(tmp_path, config, lambda q: {"": float(expit(q)), "scorer": q}))
    assert set(found) == {"scorer"} and loaded(found["scorer"]).scorer.type == "verifier"
    assert loaded(found["scorer"]).slope == pytest.approx(2.0, rel=0.4)
