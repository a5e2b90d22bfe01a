"""Runs side by side."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from raylign.config import EvaluateConfig, parse_config
from raylign.config.evaluate import EvaluateRunBlock
from raylign.errors import ConfigError
from raylign.report.record import read_run
from raylign.run.directory import create_run
from recipes.commands.compare import compare_runs, differing_options
from tests.unit.report.run_records import config_of, save_run


def compared(*paths: Path) -> str:
    console = Console(record=True, width=200)
    compare_runs(paths, console)
    return console.export_text()


def test_the_difference_is_paired_by_prompt_and_against_the_first(tmp_path: Path) -> None:
    first = save_run(tmp_path, [0.1] * 20, "first")
    second = save_run(tmp_path, [0.3 + 0.01 * (i % 2) for i in range(20)], "second")
    lines = [line.strip() for line in compared(first.path, second.path).splitlines()]
    rows = {line.partition("  ")[0]: number for number, line in enumerate(lines)}
    assert lines[rows["run"]].split() == ["run", "first", "second"]
    place = rows["score against the first"]
    assert lines[place].split()[-2:] == ["-", "+0.205"]
    assert lines[place + 1].startswith("[+0.20") and lines[place + 1].endswith("20 prompts")
    assert max(map(len, lines)) < 80
    assert "no option differs" in lines, "names and folders are no options to compare"


def test_options_that_differ_are_named_with_both_values(tmp_path: Path) -> None:
    records = [read_run(save_run(tmp_path, [0.1] * 4, name)) for name in ("a", "b")]
    other = parse_config(records[1].config.model_dump(), ["loss.beta=0.3", "run.seed=5"])
    rule = {"measure": "kl", "above": 1.0, "action": "warn"}
    guarded = replace(records[1], config=parse_config(records[1].config.model_dump() | {"guard": [rule]}))
    assert differing_options([records[0], guarded]) == {
        "guard.0.measure": ["-", "kl"],
        "guard.0.above": ["-", "1.0"],
        "guard.0.after_rounds": ["-", "0"],
        "guard.0.action": ["-", "warn"],
    }, "no line for an empty list, and none for a bound that the rule does not have"
    changed = type(records[1])(records[1].path, other, None, (), (), (), {}, ())
    assert differing_options([records[0], changed]) == {"run.seed": ["0", "5"], "loss.beta": ["0.1", "0.3"]}


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    done = save_run(tmp_path, [0.1] * 4, "done")
    config = config_of(tmp_path, "begun")
    begun = create_run(config.run, config)
    with pytest.raises(ConfigError, match="at least 2"):
        compared(done.path)
    with pytest.raises(ConfigError, match="no finished round"):
        compared(done.path, begun.path)
    evaluated = EvaluateConfig(run=EvaluateRunBlock(dir=tmp_path))
    create_run(evaluated.run, evaluated)
    with pytest.raises(ConfigError, match="read what came of it: raylign review show"):
        compared(done.path, tmp_path / "evaluate")
