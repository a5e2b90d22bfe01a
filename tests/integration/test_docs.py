"""Every command in README and the guides is known to a test, and the quick ones run here for real."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    *("README.md", "recipes/README.md", "recipes/runs.md", "platform/README.md"),
    *("deploy/README.md", "deploy/jobs.md", "deploy/security.md", "CONTRIBUTING.md"),
)
BIN = Path(sys.executable).parent

RUN_ELSEWHERE = {
    "make demo": "integration/test_interrupts.py runs its recipe, test_job_submission.py its model, on fewer prompts",
    "make test": "this very run",
    "make setup": "makes the environment this test runs in",
    "make lint": "below, as its three commands",
    "make bench": "below, make -n",
    "make fuzz": "tests/unit/test_fuzz.py, fewer inputs",
    "make clean": "below, make -n",
    "python recipes/minimal.py": "tests/integration/test_minimal.py, fewer prompts and a random model",
    "raylign run": "test_interrupts.py, test_offline_recipes.py, test_model_scorers.py",
    "raylign export": "tests/unit/recipes/commands/test_cli.py; test_offline_recipes.py a reward model",
    "raylign review show": "tests/unit/report/test_page.py; tests/unit/recipes/commands/test_cli.py",
    "raylign compare": "tests/unit/recipes/commands/test_compare.py",
    "raylign promote": "tests/integration/test_promote.py",
    "raylign data prepare": "tests/unit/data/test_prepare_pipeline.py",
    "raylign resume": "tests/integration/test_kills.py; tests/unit/run/test_resume.py with other settings",
    "raylign sync": "tests/integration/test_mlflow_faults.py",
    "raylign review": "tests/integration/test_review.py",
    "mlflow ui": "tests/integration/test_mlflow_faults.py runs a server on such a database",
    "raylign submit": "tests/integration/test_job_submission.py",
    "ray job submit": "tests/integration/test_job_submission.py",
}
RUN_HERE = ("raylign plan", "raylign doctor")


def _commands() -> list[str]:
    """Lines of every bash block, comments cut off, continuation lines joined."""
    blocks = [
        block
        for name in DOCUMENTS
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / name).read_text().replace("\\\n", " "), re.DOTALL)
    ]
    lines = [re.split(r"\s#\s|\s{2,}#", line)[0].strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line})


def test_documents_have_commands() -> None:
    assert {"make demo", "make test"} <= set(_commands())


@pytest.mark.parametrize("command", _commands())
def test_command_is_tested(command: str) -> None:
    known = [prefix for prefix in (*RUN_ELSEWHERE, *RUN_HERE) if command.startswith(prefix)]
    assert known, f"{command!r} is in the documentation but no test runs it"


@pytest.mark.parametrize("command", [line for line in _commands() if line.startswith(RUN_HERE)])
def test_quick_command_runs(command: str) -> None:
    program, *arguments = shlex.split(command)
    done = subprocess.run([BIN / program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["demo", "test", "lint", "bench", "fuzz", "clean", "setup"])
def test_make_target_exists(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
