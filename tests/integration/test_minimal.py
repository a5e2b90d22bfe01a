"""The loop to read, in one process: it runs, and its first step is DPO's at its start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_it_fits_on_a_page() -> None:
    assert len((ROOT / "recipes/minimal.py").read_text().splitlines()) <= 120


@pytest.mark.slow
def test_a_round_of_the_demos_task(tiny_llama: str) -> None:
    """Of 48 random tokens some are words with a mood, so that scores differ by enough for pairs."""
    options = {"path": tiny_llama, "rounds": 1, "prompts-per-round": 4, "held-out": 1, "candidates": 3}
    done = subprocess.run(
        [sys.executable, "recipes/minimal.py", *(f"--{name}={value}" for name, value in options.items())],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["round 0", "round 1"]
    assert lines[1].endswith("loss 0.693"), "ln 2: the policy is its reference"
