"""Whole campaigns that are small enough for tests, run as processes of their own and watched from outside."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes.commands.sync import sync_run

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipes/sentiment_smollm2.yaml"
SMALLEST = (
    "model.dtype=float32",  # processors without bf16 instructions take nine times as long in bf16
    "schedule.rounds=1",
    "schedule.prompts_per_round=4",
    "sampling.num_generations=3",
    "sampling.max_new_tokens=12",
    "prompts.held_out=2",
    "pairing.min_margin=0",
    "placement.generator_cpus=1",  # tests run side by side
    "placement.trainer_cpus=1",
    "generators.kv_cache_gb=0.1",  # which a new process has to clear
)
SPREAD_SCORES = """\
import zlib


def score(prompts, completions):
    return [zlib.crc32(completion.encode()) / 2**32 for completion in completions]
"""
"""A scoring module for random models, whose texts VADER scores all alike: without differences there are no pairs."""
LONG_SAMPLING = ("schedule.prompts_per_round=48", "sampling.num_generations=6", "sampling.max_new_tokens=400")
LONG_TRAINING = ("trainer.num_train_epochs=2000", "trainer.per_device_train_batch_size=1")
START_S = 1200.0
"""Longest start of engines and trainers; 35 s on two idle cores."""
_MARK = "RAYLIGN_TEST_MARK"
_POLL_S = 0.2
_SETTLED_S = 3.0
"""A name in shared memory that is older has been mapped by who made it."""
_NOT_INHERITED = re.compile("RAY|MLFLOW|PYTHON|FORCE_COLOR|CLICOLOR")


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without settings of Ray, MLflow, Python and colours; the checkout is importable."""
    kept = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.match(name)}
    if "RAYLIGN_CACHE" in os.environ:
        kept["RAYLIGN_CACHE"] = os.environ["RAYLIGN_CACHE"]
    return {**kept, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}", **extra}


def script(*settings: str) -> list[str]:
    """The recipe started as a plain Python script."""
    return [sys.executable, str(ROOT / "recipes/online_dpo.py"), str(ROOT / RECIPE), *settings]


def command_line(*settings: str, recipe: str = RECIPE) -> list[str]:
    """`raylign run` of the recipe."""
    return [sys.executable, "-m", "recipes.commands.cli", "run", str(ROOT / recipe), *settings]


_OWN_LINES = re.compile(
    r"starting; actor logs are in \S+, this process's in \S+/libraries\.log"
    r"|team ready in \d+ s; vLLM and trainer differ by [\d.]+ nats a token on the canary"
    r"|trainers ready in \d+ s"
    r"|\d+ rows to train on, \d+ held out; .*"
    r"|round \d+ [a-z]+(-\d+)? \d+(/\d+)? [a-z ]+( in [\d.]+ s)?"
    r"|round \d+: held-out [a-z_/]+ .*"
    r"|(INFO|WARNING|ERROR) (raylign|actors|recipes)\.[\w.]+: .*"
    r"|waiting for people: \d+ of \d+ questions have no answer yet; answer them at .* and run the same command again"
    r"|(Better|Worse|No clear change): .*|(gold score|alignment tax|best by)\b.*|(guard|ended) after round \d+: .*"
    r"|(note|guard|results|MLflow|page|report|export): .*"
    r"|-+ held-out samples -+|prompt \S+|(before|after), score .*"
    r"|round {2,}\S.*|[ ─].*"
    r"|"
)
"""Every line that `raylign run` prints; texts of samples are indented, and rows of the table, but for its head."""


def foreign_lines(output: str) -> list[str]:
    """The lines of a console that raylign did not write."""
    return [line for line in output.splitlines() if not _OWN_LINES.fullmatch(line)]


def wait_until(is_true: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    """Fail with `what()` when `is_true` stays false for `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what()}"
        time.sleep(_POLL_S)


class Watched:
    """A process in a session of its own whose descendants and shared memory can be told from everybody else's."""

    def __init__(self, command: Sequence[str], folder: Path, **extra: str) -> None:
        """Start `command` in `folder`; stdout and stderr go to one file."""
        self.folder = folder
        self._born: dict[str, float] = {}
        self._others = _pids()
        self._mark = f"{_MARK}={uuid.uuid4().hex}".encode()
        self._log = folder / f"output-{uuid.uuid4().hex[:8]}.txt"
        # Ray's socket paths may have 107 characters, which pytest's folders use up.
        self._ray = tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp", ignore_cleanup_errors=True)
        name, _, value = self._mark.decode().partition("=")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean_environment({"RAY_TMPDIR": self._ray.name, name: value, **extra}),
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whatever the test found: nothing of it outlives the test."""
        for pid in self.processes():
            _signal(pid, signal.SIGKILL)
        self._process.wait()
        self._ray.cleanup()

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, timeout_s: float = START_S) -> None:
        """Wait until the output has `text`; the process must not end before."""
        wait_until(lambda: text in self.output or self.ended, timeout_s, lambda: f"{text!r} in\n{self.output}")
        assert text in self.output, f"ended with {self._process.returncode} before {text!r}:\n{self.output}"

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def send(self, number: signal.Signals, *, to_group: bool) -> None:
        """Signal the process, or its whole group as a terminal does."""
        os.kill(-self._process.pid if to_group else self._process.pid, number)

    def finish(self, timeout_s: float) -> tuple[int, set[Path]]:
        """Exit status, negative when a signal ended it, and the shared memory that was seen in use until then."""
        segments: set[Path] = set()

        def watch() -> bool:
            segments.update(self.shared_memory())
            return self.ended

        wait_until(watch, timeout_s, lambda: f"still running\n{self.output}")
        return self._process.wait(), segments

    def processes(self) -> dict[int, str]:
        """Command lines of the living processes that carry the mark or belong to the session, by id."""
        living = _pids()
        self._others &= living
        new = living - self._others
        return {pid: line for pid in new if (line := command_line_of(pid)) and self._owns(pid)}

    def _owns(self, pid: int) -> bool:
        try:
            return os.getsid(pid) == self._process.pid or self._mark in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False

    def shared_memory(self) -> set[Path]:
        """Files in /dev/shm that its processes have mapped and that still have a name; while none is new, nothing."""
        now = time.monotonic()
        self._born = {name: self._born.get(name, now) for name in os.listdir("/dev/shm")}
        if all(now - born > _SETTLED_S for born in self._born.values()):
            return set()
        return {path for pid in self.processes() for path in _mapped(pid) if path.exists()}


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def command_line_of(pid: int) -> str:
    """Empty for kernel threads, zombies and processes that have just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _mapped(pid: int) -> set[Path]:
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return set()
    return {Path(path) for path in re.findall(r"/dev/shm/\S+$", maps, re.MULTILINE)}


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def random_llama(folder: Path, tokenizer: str, *, vocabulary: int, width: int, spread: float) -> str:
    """A random 2-layer Llama with tied embeddings in `folder`, with the tokenizer of another unless that is ""."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    if tokenizer:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def weight_folders(run_name: str) -> list[Path]:
    """Folders for weight files of runs of this name that are still in shared memory."""
    return sorted(Path("/dev/shm").glob(f"raylign-{run_name}-*"))


def synced_record(run: Path) -> Run:
    """The campaign of run directory `run` in MLflow's database beside it, once `raylign sync` has sent the rest.

    Who is stopped waits for MLflow for a few seconds only.
    """
    sync_run(run, None, START_S, Console(quiet=True))
    return campaign_record(run.parent)


def campaign_record(runs: Path, experiment: str = "raylign") -> Run:
    """The one campaign in the MLflow database beside the run directories."""
    client = MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    campaigns = client.search_runs([found.experiment_id], "tags.`raylign.kind` = 'campaign'")
    assert len(campaigns) == 1
    return campaigns[0]
