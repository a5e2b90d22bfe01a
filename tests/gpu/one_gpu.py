"""Everything that needs a GPU, checked on one NVIDIA GPU within eight minutes: a table, JSON, and a status.

    python tests/gpu/one_gpu.py                        # on the GPU; tests/gpu/README.md says what must be installed
    python tests/gpu/one_gpu.py --device cpu --tiny    # the same checks where they need no GPU, in a minute

Every group of checks has a process of its own, the most valuable first; what does not fit in the time that is left is
left out, and its row says so. The status is 1 when a check has failed, 2 when there is no GPU.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
# Python puts this file's own folder first, whose `kernels` is not the library of that name.
_OTHERS = [place for place in sys.path if place != str(Path(__file__).resolve().parent)]
sys.path[:] = [str(ROOT), str(ROOT / "platform"), *_OTHERS]

from tests.gpu.rows import Row, Sheet, read_rows, table  # noqa: E402

if TYPE_CHECKING:
    from tests.gpu.stage import Stage

_STARTED = time.monotonic()
_END_S = 10.0
"""Kept for the table and the files."""
_GRACE_S = 15.0
"""How much longer than its time a group may take before it is ended."""
_LIBRARIES = (
    *("torch", "triton", "transformers", "peft", "deepspeed"),
    *("trl", "bitsandbytes", "liger-kernel", "flash-attn"),
)
_ROOM = 10 << 30
"""Bytes that shared memory must have free to hold the models."""
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    # Without it some products of cuBLAS differ from run to run.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


@dataclass(frozen=True, slots=True)
class Group:
    """Checks of one process: not begun with less than `least_s` left, and ended after `most_s`."""

    name: str
    least_s: float
    most_s: float


GROUPS = (
    Group("kernels", 30, 90),
    Group("speed-full", 45, 130),
    Group("trl-full", 50, 130),
    Group("zero", 30, 110),
    Group("qlora", 25, 60),
    Group("handover", 20, 40),
    Group("ipc", 25, 50),
    Group("speed-lora", 30, 60),
    Group("trl-lora", 40, 80),
)
_TOLD_AGAIN = ("FAIL", "SKIP")
"""At the end, behind a table that may be longer than what is kept of the output."""
_TINY = ("kernels", "trl-full", "speed-full", "zero", "handover", "qlora", "ipc")
"""In one process, TRL before a process group is open."""


def main() -> int:
    asked = _arguments()
    if asked.device == "cuda" and shutil.which("nvidia-smi") is None:
        print("one_gpu: not measured: no NVIDIA GPU here (no nvidia-smi); --device cpu --tiny needs none")
        return 2
    if asked.group:
        run_group(asked.group, asked.device, asked.tiny, Path(asked.folder), asked.seconds)
        return 0
    end = _STARTED + 60 * asked.minutes - _END_S
    with _scratch(asked.tiny) as folder:
        os.environ |= _QUIET | {"CUDA_VISIBLE_DEVICES": _first_gpu() if asked.device == "cuda" else ""}
        for group in _wanted(asked.only, asked.tiny):
            if asked.tiny:
                run_group(group.name, asked.device, True, folder, end - time.monotonic())
            else:
                in_process(group, asked.device, False, folder, end)
        return _finish(read_rows(folder / "rows.jsonl"), Path(asked.out))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, no requirements of speed")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--only", nargs="*", choices=[group.name for group in GROUPS], help="these groups alone")
    parser.add_argument("--out", default="one_gpu.json", help="file for what was measured")
    for hidden, kind in (("--group", str), ("--folder", str), ("--seconds", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.device == "cpu" and not asked.tiny:
        parser.error("--device cpu needs --tiny: the full shapes take hours there")
    return asked


def _first_gpu() -> str:
    """TRL's trainer would spread over all that it sees."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def _wanted(only: list[str] | None, tiny: bool) -> list[Group]:
    known = {group.name: group for group in GROUPS}
    names = _TINY if tiny else tuple(known)
    return [known[name] for name in names if only is None or name in only]


@contextmanager
def _scratch(tiny: bool) -> Iterator[Path]:
    """A folder for models and rows, in memory where there is room."""
    memory = Path("/dev/shm")
    roomy = not tiny and memory.is_dir() and shutil.disk_usage(memory).free > _ROOM
    with tempfile.TemporaryDirectory(prefix="one-gpu-", dir=memory if roomy else None) as folder:
        yield Path(folder)


def in_process(group: Group, device: str, tiny: bool, folder: Path, end: float) -> None:
    """Run `group` in a process of its own, which ends with it."""
    left = end - time.monotonic()
    sheet = Sheet(folder / "rows.jsonl", group.name, left)
    if not sheet.has_time("the whole group", group.least_s):
        return
    seconds = min(left, group.most_s)
    arguments = ["--device", device, "--group", group.name, "--folder", str(folder), "--seconds", str(seconds)]
    arguments += ["--tiny"] if tiny else []
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, __file__, *arguments], cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(seconds + min(_GRACE_S, max(0.0, left - seconds)))
    except subprocess.TimeoutExpired:
        sheet.fail("the whole group", f"had not ended after {seconds:.0f} s")
        return
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    taken = time.monotonic() - started
    if status:
        sheet.fail("the whole group", f"ended with status {status} after {taken:.0f} s")
    else:
        sheet.inform("the whole group", taken, "s")


def run_group(name: str, device: str, tiny: bool, folder: Path, seconds: float) -> None:
    """The checks of one group, in this process, to `folder`/rows.jsonl."""
    from tests.gpu.stubs import without_ray  # noqa: PLC0415 - before anything of `actors`

    without_ray()
    from raylign.boundary.imports import lean_imports  # noqa: PLC0415 - the first process does without

    # Checks collect garbage to have memory back, which need not look at what is imported.
    with lean_imports():
        import torch  # noqa: PLC0415

        from tests.gpu.stage import Stage  # noqa: PLC0415

    sheet = Sheet(folder / "rows.jsonl", name, seconds - (0 if tiny else time.monotonic() - _STARTED))
    stage = Stage(torch.device(device, 0) if device == "cuda" else torch.device("cpu"), tiny, folder, sheet)
    with sheet.trying("the whole group"):
        check_group(name, stage)


def check_group(name: str, stage: "Stage") -> None:
    """Its modules are imported here: what one group needs must not stop the others."""
    match name:
        case "kernels":
            from tests.gpu import kernels  # noqa: PLC0415

            kernels.check(stage)
        case "zero":
            from tests.gpu import zero  # noqa: PLC0415

            zero.check(stage)
        case "handover":
            from tests.gpu import handover  # noqa: PLC0415

            handover.check_steps(stage)
        case "ipc":
            from tests.gpu import ipc  # noqa: PLC0415

            ipc.check(stage)
        case "qlora" | "speed-full" | "speed-lora":
            from tests.gpu import speed  # noqa: PLC0415

            if name == "qlora":
                speed.qlora(stage)
            else:
                speed.ours(stage, "full" if name == "speed-full" else "LoRA")
        case "trl-full" | "trl-lora":
            from tests.gpu import beside_trl  # noqa: PLC0415

            beside_trl.check(stage, "full" if name == "trl-full" else "LoRA")
        case _:
            raise ValueError(f"no group is named {name!r}")


def _finish(rows: list[Row], out: Path) -> int:
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("PASS", "FAIL", "SKIP", "INFO")}
    record = {
        "machine": _machine(),
        "seconds": round(time.monotonic() - _STARTED, 1),
        "counts": counts,
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(record, indent=1)
    out.write_text(text + "\n", encoding="utf-8")
    print(text)
    print(table(rows))
    print(
        "\n".join(f"{row.verdict}: {row.group}: {row.what}: {row.note}" for row in rows if row.verdict in _TOLD_AGAIN)
    )
    print(f"{record['machine']}\n{counts} in {record['seconds']} s; {out}")
    return 1 if counts["FAIL"] else 0


def _machine() -> dict[str, str]:
    """The card, and the versions of what computed."""
    found = {"python": sys.version.split()[0]}
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    sys.exit(main())
