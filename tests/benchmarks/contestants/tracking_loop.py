"""A loop of optimizer steps that journals every step, with the journal fed to MLflow servers in every condition."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from mlflow.entities import TraceInfo
from torch import nn

from raylign.config import parse_config
from raylign.records import Candidate, Prompt, Score
from raylign.run.tables import write_candidates
from raylign.tracking.facts import run_facts
from raylign.tracking.feed import MlflowFeed, load_state
from raylign.tracking.journal import JOURNAL_NAME, Journal, read_events
from raylign.tracking.mlflow_store import MlflowStore
from raylign.tracking.tracker import Tracker
from tests.benchmarks.harness.children import contestant, progress
from tests.benchmarks.harness.tracking import Server, TrackedBlock, TrackingJob, TrackingResult
from tests.fakes import NoFeed
from tests.mlflow_servers import free_port, mlflow_server, slow_proxy, wait_until

WIDTH, ROWS, LAYERS = 512, 256, 4
TRIAL = 20
HELD_OUT = 64
ASKED, ANSWER = "Write a short review of a film that you have seen. " * 4, "It was a fine film, and I liked it. " * 32
CLOSE_S = {Server.HEALTHY: 30.0}
"""How long a block waits for MLflow at its end; a second elsewhere."""
METRICS = dict.fromkeys(
    (
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "num_tokens",
        "tokens_per_second",
    ),
    0.5,
)


_TRACED: list[str] = []
"""Ids of the traces that were begun in this process."""


def _count_traces() -> None:
    start = MlflowStore.start_trace

    def counted(store: MlflowStore, info: TraceInfo) -> None:
        _TRACED.append(info.trace_id)
        start(store, info)

    MlflowStore.start_trace = counted  # type: ignore[assignment,method-assign]


def run(job: TrackingJob) -> TrackingResult:
    _count_traces()
    step = _step_of(job.step_s)
    with tempfile.TemporaryDirectory(prefix="bench-tracking-") as name, ExitStack() as servers:
        folder = Path(name)
        healthy = servers.enter_context(mlflow_server(folder, free_port()))
        slow = servers.enter_context(slow_proxy(healthy, job.delay_s, folder))
        killed = f"http://127.0.0.1:{free_port()}"
        (folder / "killed").mkdir()
        desk = _Desk(folder, job, step, {Server.HEALTHY: healthy, Server.SLOW: slow, Server.KILLED: killed})
        return TrackingResult(blocks=tuple(block for repeat in range(job.repeats) for block in desk.blocks(repeat)))


def _step_of(seconds: float) -> Callable[[], None]:
    """An optimizer step over as many micro-batches as take about `seconds` here."""
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    model, rows = nn.Sequential(*layers), torch.randn(ROWS, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(micro_batches: int) -> None:
        for _ in range(micro_batches):
            (model(rows).square().mean() / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()

    trials = []
    for _ in range(6):
        began = time.perf_counter()
        step(TRIAL)
        trials.append(time.perf_counter() - began)
    count = max(1, round(TRIAL * seconds / min(trials)))
    return lambda: step(count)


class _Times(NamedTuple):
    """Seconds of a step with its event: by the clock, computing, waiting for a core; and of the event."""

    step: float
    cpu: float
    waited: float
    append: float


@dataclass(frozen=True, slots=True)
class _Desk:
    """Every condition has a run directory, whose campaign goes on from block to block."""

    folder: Path
    job: TrackingJob
    step: Callable[[], None]
    uris: Mapping[Server, str]

    def blocks(self, repeat: int) -> Iterator[TrackedBlock]:
        """A block of each condition; which one is first changes from repeat to repeat."""
        order, first = list(Server), repeat % len(Server)
        for server in order[first:] + order[:first]:
            block = self._block(server, repeat)
            seconds = f"{fmean(block.steps_s):.3f} s a step, of them {fmean(block.waits_s):.3f} s without a core"
            progress(f"repeat {repeat + 1}, {server}: {seconds}")
            yield block

    def _block(self, server: Server, repeat: int) -> TrackedBlock:
        run_dir = self.folder / server.name
        with ExitStack() as victim:
            if server is Server.KILLED:
                port = int(self.uris[server].rpartition(":")[2])
                victim.enter_context(mlflow_server(self.folder / "killed", port))
            journal = Journal(run_dir / JOURNAL_NAME)
            feed = MlflowFeed(run_dir, self.uris[server], "bench") if server in self.uris else NoFeed()
            tracker = Tracker(journal, feed)
            if repeat == 0:
                tracker.run_started(parse_config({}), run_facts())
            tracker.round_started(repeat + 1)
            _held_out(tracker, run_dir, repeat + 1)
            if server in (Server.HEALTHY, Server.KILLED):
                wait_until(lambda: load_state(run_dir, self.uris[server]).sequence == _events(run_dir))
            before, cpu = len(_TRACED), _others_cpu_s()
            times = self._train(tracker, repeat + 1, victim.close)
            cpu, traced = _others_cpu_s() - cpu, len(_TRACED) - before
        journal.close()
        missing = feed.close(CLOSE_S.get(server, 1.0))
        if server is Server.SLOW:
            time.sleep(3 * self.job.delay_s)  # for the answer that its feed still waits for
        return TrackedBlock(
            server=server,
            repeat=repeat,
            steps_s=tuple(each.step for each in times),
            cpu_s=tuple(each.cpu for each in times),
            waits_s=tuple(each.waited for each in times),
            appends_s=tuple(each.append for each in times),
            feed_cpu_s=cpu,
            events=_events(run_dir),
            missing=missing,
            traces=traced,
        )

    def _train(self, tracker: Tracker, index: int, kill: Callable[[], None]) -> list[_Times]:
        """Every step of a block; `kill` is called after a third of them."""
        times = []
        for number in range(1, self.job.steps + 1):
            waited, cpu, began = _waited_s(), time.thread_time(), time.perf_counter()
            self.step()
            trained = time.perf_counter()
            tracker.step(index, number, METRICS)
            ended = time.perf_counter()
            cpu, waited = time.thread_time() - cpu, _waited_s() - waited
            times.append(_Times(ended - began, cpu, waited, ended - trained))
            if number == self.job.steps // 3:
                kill()
        return times


def _held_out(tracker: Tracker, run_dir: Path, index: int) -> None:
    """Completions that become traces while the steps of the round are taken."""
    folder = run_dir / f"rounds/{index:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [Prompt(f"h{number:06d}", ({"role": "user", "content": ASKED},), (1,)) for number in range(HELD_OUT)]
    found = [Candidate(own.id, 0, (2,) * 256, (-1.0,) * 256, ANSWER, "stop", index, 1) for own in prompts]
    write_candidates(folder / "samples.parquet", prompts, found, [Score(0.5, {"quality": 0.5})] * HELD_OUT)
    tracker.artifact(folder / "samples.parquet", "samples", index)


def _waited_s() -> float:
    """Seconds for which this thread was ready and had no core."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def _others_cpu_s() -> float:
    """CPU seconds of all threads but this one."""
    return time.process_time() - time.thread_time()


def _events(run_dir: Path) -> int:
    return sum(1 for _ in read_events(run_dir / JOURNAL_NAME))


if __name__ == "__main__":
    contestant(run, TrackingJob)
