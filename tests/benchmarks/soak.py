"""Many rounds under random faults: nothing is lost, nothing comes twice, and nothing grows."""

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow.parquet as pq
import typer
from mlflow.tracking import MlflowClient
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from raylign.models import resolve_model
from raylign.report.tables import report_console
from raylign.run.directory import RunDirectory
from raylign.tracking.feed import load_state
from raylign.tracking.journal import JOURNAL_NAME, read_events
from tests.benchmarks.harness.chaos import DRIVER, KILLED, OUTAGE, SLOW, WEIGHTS, Chaos, kill_one
from tests.benchmarks.harness.children import ROOT, measured
from tests.benchmarks.harness.models import save_random_llama
from tests.benchmarks.harness.report import Check, finish, results_folder, table
from tests.mlflow_servers import free_port, mlflow_server

NAME = "soak"
PROMPTS, K = 8, 4
MAX_GROWTH = 1.1
"""Of the driver's memory, last third of its longest life over the first."""
MAX_DESCRIPTORS = 8
SLOW_S, OUTAGE_S, POLL_S = 5.0, 8.0, 0.5
SCORER = """\
import pathlib, time, zlib

SLOW = pathlib.Path(__file__).parent / "slow"


def score(prompts, completions):
    time.sleep(0.5 * SLOW.exists())
    return [zlib.crc32(completion.encode()) / 2**32 for completion in completions]
"""


@dataclass
class Life:
    """One driver process, from start to end: bytes and file descriptors, sample by sample."""

    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)


class Soak:
    """The campaign, started again whenever its driver was killed, and the MLflow server it reports to."""

    def __init__(self, folder: Path, rounds: int, chaos: Chaos, seed: int, console: Console) -> None:
        self.directory = RunDirectory(folder / "runs" / NAME)
        self.lives: list[Life] = []
        self._folder, self._rounds, self._chaos, self._console = folder, rounds, chaos, console
        self._random, self._port = random.Random(seed), free_port()
        self._server, self._timers = ExitStack(), dict[str, float]()
        # What MLflow must have for an outage to be over, and since when it is back; (0, 0) outside outages.
        self._awaited = (0, 0.0)
        (folder / "soaked.py").write_text(SCORER)
        model = folder / "model"
        save_random_llama(model, width=128, layers=2, vocabulary=49152)
        AutoTokenizer.from_pretrained(resolve_model("embedded:smollm2-135m")).save_pretrained(model)

    @property
    def journal(self) -> Path:
        return self.directory.path / JOURNAL_NAME

    def run(self) -> None:
        """Until all rounds are done."""
        self._server.enter_context(mlflow_server(self._folder, self._port))
        with self._server:
            while self._live():
                self._say("driver killed; the same command again")
            self._settle()

    def _live(self) -> bool:
        """One process from start to end; True when it was killed on purpose."""
        self.lives.append(Life())
        with self._driver() as driver:
            known = self._reports()
            while driver.poll() is None:
                time.sleep(POLL_S)
                self._sample(driver.pid)
                self._end_timed()
                if self._reports() > known:
                    known = self._reports()
                    self._say(f"{known} of {self._rounds} rounds, {len(self._chaos.injected)} faults")
                if "team ready" in self._output() and self._reports() < self._rounds - 2:
                    self._injure(driver)
                self._chaos.follow(self.journal)
        if driver.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"soak: the run ended with status {driver.returncode}:\n{self._output()[-3000:]}")
        return driver.returncode != 0

    @contextmanager
    def _driver(self) -> Iterator[subprocess.Popen[bytes]]:
        settings = (
            *(f"schedule.rounds={self._rounds}", f"schedule.prompts_per_round={PROMPTS}"),
            *(f"sampling.num_generations={K}", "sampling.max_new_tokens=48", "prompts.held_out=4"),
            *("pairing.min_margin=0", "scoring.function=soaked:score", "scoring.batch_size=8"),
            *("generators.count=2", "generators.kv_cache_gb=0.1", "generators.max_num_seqs=16", "trainer.ranks=2"),
            *("trainer.per_device_train_batch_size=2", "trainer.save_total_limit=2", "model.dtype=float32"),
            *("placement.generator_cpus=1", "placement.trainer_cpus=1", "recovery.max_restarts=1000"),
            *(f"model.path={self._folder / 'model'}", f"tracking.uri=http://127.0.0.1:{self._port}"),
            *("run.dir=runs", f"run.name={NAME}"),
        )
        command = [sys.executable, str(ROOT / "recipes/online_dpo.py"), str(ROOT / "recipes/sentiment_smollm2.yaml")]
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [*command, *settings],
                cwd=self._folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._chaos.begin()
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            process.wait(60)

    @property
    def _log(self) -> Path:
        return self._folder / f"driver-{len(self.lives)}.log"

    def _output(self) -> str:
        return self._log.read_text(errors="replace")

    def _reports(self) -> int:
        return self.directory.rounds_finished() if self.directory.path.is_dir() else 0

    def _sample(self, pid: int) -> None:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            self.lives[-1].memory.append(process.memory_info().rss)
            self.lives[-1].descriptors.append(process.num_fds())

    def _injure(self, driver: subprocess.Popen[bytes]) -> None:
        for name in self._chaos.due():
            self._chaos.inject(name, lambda name=name: self._act(name, driver))  # type: ignore[misc]

    def _act(self, name: str, driver: subprocess.Popen[bytes]) -> bool:
        if name in KILLED:
            return kill_one(driver.pid, KILLED[name][1], self._random)
        if name == DRIVER:
            driver.kill()
        elif name == SLOW:
            (self._folder / "slow").touch()
            self._timers[SLOW] = time.time() + SLOW_S
        else:
            self._server.close()
            self._timers[OUTAGE] = time.time() + OUTAGE_S
        return True

    def _end_timed(self) -> None:
        """Slowness and outages end by themselves; an outage is over when MLflow has every event of that moment."""
        if self._timers.get(SLOW, time.time() + 1) < time.time():
            (self._folder / "slow").unlink()
            self._chaos.end(SLOW, SLOW_S)
            del self._timers[SLOW]
        if self._timers.get(OUTAGE, time.time() + 1) < time.time():
            del self._timers[OUTAGE]
            self._server.enter_context(mlflow_server(self._folder, self._port))
            self._awaited = (max(e.sequence for e in read_events(self.journal)), time.time())
        if self._awaited[0] and self._sent() >= self._awaited[0]:
            self._chaos.end(OUTAGE, time.time() - self._awaited[1])
            self._awaited = (0, 0.0)

    def _sent(self) -> int:
        return load_state(self.directory.path, f"http://127.0.0.1:{self._port}").sequence

    def _settle(self) -> None:
        """A server that is away at the end comes back, and gets the rest by `raylign sync`."""
        if OUTAGE in self._timers:
            self._timers[OUTAGE] = 0.0
        self._end_timed()
        sync = [sys.executable, "-m", "recipes.commands.cli", "sync", str(self.directory.path)]
        subprocess.run(sync, cwd=self._folder, env=_environment(), check=True, timeout=300)
        self._end_timed()

    def recorded(self) -> tuple[int, int]:
        """Runs of rounds in MLflow that are finished with every step once, and all runs of rounds."""
        client = MlflowClient(tracking_uri=f"sqlite:///{self._folder}/server.db")
        experiment: Any = client.get_experiment_by_name("raylign")
        runs = client.search_runs([experiment.experiment_id], "tags.`raylign.kind` = 'round'", max_results=1000)
        steps = {report.index: len(report.steps) for report in self.directory.reports()}
        whole = 0
        for run in runs:
            found = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
            wanted = list(range(1, steps.get(int(run.data.tags["raylign.round"]), 0) + 1))
            whole += run.info.status == "FINISHED" and sorted(found) == wanted
        return whole, len(runs)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)


def _environment() -> dict[str, str]:
    """This checkout's code, and no GPU."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    return {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the campaign.")] = 50,
    every: Annotated[float, typer.Option(min=1, help="Mean seconds between faults.")] = 6.0,
    seed: Annotated[int, typer.Option(help="Of the choice of faults.")] = 0,
) -> None:
    """Run a campaign of a tiny model on this machine, harm it at random, and look at what is left."""
    folder, chaos, console = results_folder(NAME), Chaos(seed, every), report_console()
    folder.mkdir(parents=True)
    before, started = _leftovers(), time.monotonic()
    with measured(NAME), tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp", ignore_cleanup_errors=True) as short:
        os.environ["RAY_TMPDIR"] = short
        soak = Soak(folder, rounds, chaos, seed, console)
        soak.run()
    seconds = time.monotonic() - started
    wait_s = time.monotonic() + 30
    while _leftovers() - before and time.monotonic() < wait_s:
        time.sleep(POLL_S)
    checks = [*_data_checks(soak, rounds), *_growth_checks(soak.lives), _left(_leftovers() - before, console)]
    faults = [{"name": f.name, "detected_s": f.detected_s, "recovered_s": f.recovered_s} for f in chaos.injected]
    record = {"rounds": rounds, "seconds": seconds, "faults": faults, "drivers": len(soak.lives)}
    title = f"{len(faults)} faults in {rounds} rounds, {seconds:.0f} s"
    finish(console, folder, [_table(title, chaos)], [*checks, _all_over(chaos)], record)


def _data_checks(soak: Soak, rounds: int) -> list[Check]:
    missing = duplicates = 0
    for index in range(1, rounds + 1):
        rows = pq.read_table(soak.directory.round(index) / "candidates.parquet", columns=["prompt_id", "index"])
        keys = {(row["prompt_id"], row["index"]) for row in rows.to_pylist()}
        missing += PROMPTS * K - len(keys)
        duplicates += rows.num_rows - len(keys)
    whole, runs = soak.recorded()
    return [
        Check("rounds lost", rounds - soak.directory.rounds_finished(), "at most", 0),
        Check("candidates missing", missing, "at most", 0),
        Check("candidates twice", duplicates, "at most", 0),
        Check("rounds that MLflow has whole, every step once", whole, "at least", rounds),
        Check("runs of rounds in MLflow", runs, "at most", rounds),
    ]


def _growth_checks(lives: Sequence[Life]) -> list[Check]:
    """Of the driver that lived longest, whose memory and descriptors last all faults but its own end."""
    life = max(lives, key=lambda life: len(life.memory))
    third = len(life.memory) // 3
    early, late = (statistics.median(life.memory[part]) for part in (slice(third, 2 * third), slice(2 * third, None)))
    opened = [statistics.median(life.descriptors[part]) for part in (slice(third, 2 * third), slice(2 * third, None))]
    return [
        Check("memory of the driver, last third of its life over the second", late / early, "at most", MAX_GROWTH),
        Check("file descriptors more in the last third", opened[1] - opened[0], "at most", MAX_DESCRIPTORS),
    ]


def _leftovers() -> set[str]:
    """Files of ours, vLLM's and Ray's in shared and temporary folders, and actors without a driver."""
    files = [*Path("/dev/shm").iterdir(), *Path(tempfile.gettempdir()).glob("raylign-*")]
    titles = ("ray::", "VLLM::", "raylign.scoring")
    lines = {process.pid: " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])}
    return {str(path) for path in files} | {f"{pid} {line}" for pid, line in lines.items() if line.startswith(titles)}


def _left(left: set[str], console: Console) -> Check:
    for item in sorted(left):
        console.print(f"left: {item}", markup=False, highlight=False)
    return Check("processes and shared memory left", len(left), "at most", 0)


def _all_over(chaos: Chaos) -> Check:
    return Check("faults that nothing recovered from", sum(not f.over for f in chaos.injected), "at most", 0)


def _table(title: str, chaos: Chaos) -> Table:
    rows = []
    for name in WEIGHTS:
        own = [fault for fault in chaos.injected if fault.name == name]
        if own:
            detected, recovered = [s for f in own for s in f.detected_s], [s for f in own for s in f.recovered_s]
            rows.append([name, str(len(own)), *_two(detected), *_two(recovered)])
    headers = ["fault", "times", "detected in\nmedian, s", "most", "recovered in\nmedian, s", "most"]
    return table(title, headers, rows)


def _two(seconds: Sequence[float]) -> list[object]:
    return [statistics.median(seconds), max(seconds)] if seconds else ["-", "-"]


if __name__ == "__main__":
    typer.run(main)
