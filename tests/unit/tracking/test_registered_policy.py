"""What a version in MLflow's registry shows of a policy."""

from dataclasses import replace
from pathlib import Path

from raylign.run.directory import RunDirectory
from raylign.tracking.registry import Policy
from tests.unit.report.run_records import evaluated, report

EVALUATION = replace(evaluated(-0.00012), gold=0.05, gold_low=0.0, gold_high=0.1, win_rate=0.64583)
BOUNDED = replace(EVALUATION, win_rate_low=0.46, win_rate_high=0.8)


def policy(folder: Path) -> Policy:
    return Policy(
        RunDirectory(folder), "c" * 32, replace(report(2, 0.3), policy_version=3, evaluation=BOUNDED), "ab" * 32
    )


def test_what_people_filter_by_stands_before_what_raylign_finds_it_by(tmp_path: Path) -> None:
    own = policy(tmp_path / "demo")
    assert list(own.tags) == [
        "round",
        "score",
        "win_rate",
        "raylign.campaign",
        "raylign.version",
        "raylign.weights",
        "raylign.run",
    ]
    assert (own.tags["round"], own.tags["score"], own.tags["win_rate"]) == ("2", "0.000", "0.646")
    assert own.identity.items() <= own.tags.items()


def test_the_description_begins_with_what_was_reached(tmp_path: Path) -> None:
    text = policy(tmp_path / "a*b").about
    assert text.startswith("score 0.000 [-0.100, 0.100]; gold score 0.050 [0.000, 0.100]; win rate 0.65 [0.46, 0.80]. ")
    assert (
        "Policy version 3 of" in text
        and "a\\*b: `raylign export" in text
        and "--version 3 --to exported --merge`" in text
    )
