"""Contestants: each runs in a process of its own, one after another, on the same threads."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import psutil
from rich.console import Console

from raylign.config.base import Block
from recipes.commands.signals import terminable
from tests.benchmarks.harness.meter import Meter, PeakMemory, family, gpu_name

ROOT = Path(__file__).resolve().parents[3]
_NOT_INHERITED = re.compile("RAY_ADDRESS|MLFLOW_|OMP_|MKL_|TORCH|ACCELERATE|HF_|CUDA_VISIBLE_DEVICES")
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
_TAIL_LINES = 25
_GRACE_S = 60.0
_PR_SET_PDEATHSIG = 1
_PROGRESS = "BENCH_PROGRESS_FD"

J = TypeVar("J", bound=Block)
R = TypeVar("R", bound=Block)


class ContestantError(Exception):
    """A contestant ended without a result."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[R]):
    """A contestant's own result, and what was seen from outside: wall time of its process, peak memory."""

    result: R
    seconds: float
    memory: PeakMemory


class Stage:
    """Runs contestants and shows their progress. `logs` receives what they print beside it."""

    def __init__(self, console: Console, logs: Path, threads: int, on_gpu: bool = False) -> None:
        self.console, self.threads = console, threads
        self._logs, self._on_gpu = logs, on_gpu
        logs.mkdir(parents=True, exist_ok=True)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def run(self, name: str, module: str, job: Block, result: type[R]) -> Outcome[R]:
        """Run `tests.benchmarks.contestants.<module>` on `job`. Raises ContestantError with the end of its log."""
        self.say(f"{name}: starting on {self.threads} threads")
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            asked, answered = Path(folder, "job.json"), Path(folder, "result.json")
            asked.write_text(job.model_dump_json(), encoding="utf-8")
            arguments = ["-m", f"tests.benchmarks.contestants.{module}", str(asked), str(answered)]
            memory = self._watch(name, [sys.executable, *arguments], Path(folder))
            seconds = time.monotonic() - started
            outcome = Outcome(result.model_validate_json(answered.read_bytes()), seconds, memory)
        self.say(f"{name}: done in {seconds:.0f} s, peak {memory.tree / 2**30:.2f} GiB")
        return outcome

    def _watch(self, name: str, command: list[str], scratch: Path) -> PeakMemory:
        path = self._logs / f"{name.replace(' ', '-')}.log"
        reader, writer = os.pipe()
        environment = _environment(self.threads, scratch, self._on_gpu) | {_PROGRESS: str(writer)}
        with path.open("w", encoding="utf-8") as log, os.fdopen(reader, encoding="utf-8") as lines:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[writer],
                start_new_session=True,
            )
            os.close(writer)
            try:
                with Meter(process.pid, self._on_gpu) as meter:
                    for line in lines:
                        self.say(f"{name}: {line.rstrip()}")
                    status = process.wait()
            finally:
                _end(process)
        if status:
            tail = "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
            raise ContestantError(f"{name} ended with status {status}; the end of {path}:\n{tail}")
        return meter.peak()


@contextmanager
def measured(benchmark: str) -> Iterator[None]:
    """Turn a contestant's failure into one message and status 1; Ctrl-C and SIGTERM end what is running."""
    try:
        with terminable():
            yield
    except ContestantError as error:
        raise SystemExit(f"{benchmark}: {error}") from error


def _environment(threads: int, scratch: Path, on_gpu: bool) -> dict[str, str]:
    """The same for every contestant, and one GPU or none; settings of this shell that would change one stay behind."""
    kept = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.match(name)}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    own = {
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": gpu_name() if on_gpu else "",
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
    }
    return kept | _QUIET | own


def _end(process: subprocess.Popen[bytes]) -> None:
    """Only where the benchmark was interrupted is anything left: ask it to unwind, then end what remains."""
    if process.poll() is not None:
        return
    members = family(process.pid)
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        for pid in members:
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()


def contestant(run: Callable[[J], R], job: type[J]) -> None:
    """The main program of a contestant; what libraries print goes to its log, `progress` to the benchmark."""
    asked, answered = map(Path, sys.argv[1:])
    # A benchmark that is killed outright takes its contestant with it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    with terminable():
        result = run(job.model_validate_json(asked.read_bytes()))
        answered.write_text(json.dumps(result.model_dump(mode="json")), encoding="utf-8")


def progress(line: str) -> None:
    """Show one line of a contestant's progress."""
    os.write(int(os.environ.get(_PROGRESS, "1")), f"{line}\n".encode())
