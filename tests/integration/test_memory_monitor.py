"""Ray's memory monitor ends the trainer because a neighbour takes the node's memory: the run waits, and goes on."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from raylign.run.directory import RunDirectory, open_run
from raylign.tracking.journal import Event, read_events
from tests.faults import record
from tests.integration.tiny import START_S, Watched, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.long_fault, pytest.mark.timeout(1200)]

GIB = 1 << 30
SPARE = 0.8 * GIB
"""What the run may take beyond what it took undisturbed."""
MOST = 3 * GIB
HOLD_S = 10.0
NEIGHBOUR = """\
import sys, time
held = []
for _ in range(int(sys.argv[1]) >> 26):
    held.append(b"x" * (1 << 26))
    time.sleep(0.05)
time.sleep(600)
"""


def command(model: str, folder: Path) -> list[str]:
    rows = [{"instruction": f"Count to {n}", "chosen": f"good {n}", "rejected": f"bad {n} {n}"} for n in range(208)]
    (folder / "rows.json").write_text(json.dumps(rows))
    raw = {
        "recipe": "offline_dpo",
        "run": {"dir": "runs", "name": "short"},
        "model": {"path": model, "dtype": "float32", "lora": {"r": 8, "lora_alpha": 16}},
        "data": {"source": str(folder / "rows.json"), "held_out": 8, "max_length": 128},
        "trainer": {"per_device_train_batch_size": 1, "save_steps": 40},
        "schedule": {"num_train_epochs": 2},
        "placement": {"trainer_cpus": 1},
    }
    (folder / "short.yaml").write_text(yaml.safe_dump(raw))
    return [sys.executable, "-m", "recipes.commands.cli", "run", str(folder / "short.yaml")]


def events(folder: Path) -> list[Event]:
    journal = folder / "runs/short/events.jsonl"
    return list(read_events(journal)) if journal.is_file() else []


def incidents(folder: Path) -> list[Event]:
    return [event for event in events(folder) if event.name == "incident"]


def steps_done(folder: Path) -> int:
    return sum(event.name == "step" for event in events(folder))


@contextmanager
def neighbour() -> Iterator[None]:
    """A process of nobody's cluster that takes memory, bit by bit and at most `MOST`, and gives it back at the end."""
    with subprocess.Popen([sys.executable, "-c", NEIGHBOUR, str(MOST)]) as process:
        try:
            yield
        finally:
            process.kill()


def own_memory(run: Watched) -> int:
    """What the run's processes would give back at their end, in bytes."""
    total = 0
    for pid in run.processes():
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(pid).memory_full_info().uss
    return total


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, int]:
    """The same run with memory to spare, and the most that it held."""
    folder, most = tmp_path_factory.mktemp("undisturbed"), 0
    with Watched(command(tiny_llama, folder), folder) as run:

        def measured() -> bool:
            nonlocal most
            most = max(most, own_memory(run))
            return run.ended

        wait_until(measured, START_S, lambda: run.output)
        status, _ = run.finish(START_S)
        assert status == 0, run.output
    return open_run(folder / "runs/short"), most


def test_a_neighbour_takes_the_memory_of_the_node(
    tiny_llama: str, undisturbed: tuple[RunDirectory, int], tmp_path: Path
) -> None:
    expected, own = undisturbed
    memory = psutil.virtual_memory()
    limit = memory.total - memory.available + own + SPARE
    monitor = {"RAY_memory_usage_threshold": f"{limit / memory.total:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    with Watched(command(tiny_llama, tmp_path), tmp_path, **monitor) as run:
        wait_until(lambda: steps_done(tmp_path) > 50 or run.ended, START_S, lambda: run.output)
        began = time.monotonic()
        with neighbour():
            wait_until(lambda: bool(incidents(tmp_path)) or run.ended, 120, lambda: run.output)
            lost = time.monotonic()
            time.sleep(HOLD_S)
            assert [event.payload["happened"] for event in incidents(tmp_path)] == ["lost"], "it waits for memory"
        freed = time.monotonic()
        status, _ = run.finish(START_S)
        output = run.output
    assert status == 0, output
    (first, *others) = found = incidents(tmp_path)
    assert first.payload["kind"] == "memory" and first.payload["role"] == "trainer"
    assert found[-1].payload["happened"] == "recovered", [event.payload for event in others]
    lines = [line for line in output.splitlines() if "is lost" in line]
    assert len(lines) == sum(event.payload["happened"] == "lost" for event in found)
    assert "Ray's memory monitor ended it" in lines[0] and "once its node has room" in lines[0]
    assert "Top 10 memory users" not in output and "Traceback" not in output
    ended = open_run(tmp_path / "runs/short")
    for left, right in zip(ended.reports(), expected.reports(), strict=True):
        assert left.steps == right.steps and left.evaluation == right.evaluation
    name = "adapter_model.safetensors"
    weights, wanted = (load_file(directory.checkpoint(2) / name) for directory in (ended, expected))
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[key], wanted[key]) for key in wanted)
    record(
        "Ray's memory monitor ends the trainer",
        f"a neighbour takes up to {MOST >> 30} GiB while it trains, and gives them back {HOLD_S:g} s later",
        detected_s=lost - began,
        recovered_s=found[-1].payload["seconds"] - (freed - lost),
        lost="nothing: waits until there is room, same steps and weights, status 0",
    )
