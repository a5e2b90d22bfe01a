"""The command line as a user has it."""

import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from tests.benchmarks.harness.children import ROOT, ContestantError

_TAIL = 15


def raylign(console: Console, log: Path, *words: str) -> float:
    """Run `raylign WORDS` with its output in `log`; the seconds it took. Raises ContestantError when it fails."""
    console.print(f"raylign {' '.join(words)}", markup=False, highlight=False, soft_wrap=True)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    started = time.monotonic()
    with log.open("wb") as output:
        command = [sys.executable, "-m", "recipes.commands.cli", *words]
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        raise ContestantError(f"raylign {words[0]} ended with status {done.returncode}; {log} ends:\n{tail}")
    return time.monotonic() - started
