"""Peak memory of a process tree, sampled from outside."""

import os
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_INTERVAL_S = 0.1
_GPU_INTERVAL_S = 0.5
_FIELDS = ("VmHWM", "RssAnon", "RssFile", "RssShmem")


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Bytes. `tree`: the whole contestant; `process`: its largest process alone, `gpu`: above what was in use before.

    `tree` adds up the anonymous memory of all processes, and counts file-backed memory (libraries, mapped weights) and
    shared memory once, as that of the process with most of it: the others map the same pages.
    """

    tree: int
    process: int
    gpu: int | None


@dataclass
class Meter:
    """Samples process `pid` and its descendants every 0.1 s while the context lasts."""

    pid: int
    on_gpu: bool = False
    _tree: int = 0
    _process: int = 0
    _gpu: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._watch_memory, daemon=True)]
        if self.on_gpu:
            self._threads.append(threading.Thread(target=self._watch_gpu, args=(gpu_bytes_in_use(),), daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def peak(self) -> PeakMemory:
        return PeakMemory(self._tree, self._process, self._gpu if self.on_gpu else None)

    def _watch_memory(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            samples = [sample for pid in family(self.pid) if (sample := memory_of(pid))]
            if samples:
                anonymous = sum(sample["RssAnon"] for sample in samples)
                shared = max(sample["RssFile"] for sample in samples) + max(sample["RssShmem"] for sample in samples)
                self._tree = max(self._tree, anonymous + shared)
                self._process = max(self._process, *(sample["VmHWM"] for sample in samples))

    def _watch_gpu(self, before: int) -> None:
        while not self._stop.wait(_GPU_INTERVAL_S):
            self._gpu = max(self._gpu, gpu_bytes_in_use() - before)


def family(pid: int) -> list[int]:
    """The process and its living descendants."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def memory_of(pid: int) -> dict[str, int]:
    """Bytes by field of /proc/PID/status: VmHWM is the peak of what is resident. Empty once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines)
    found = {name: int(value.split()[0]) * 1024 for name, value in pairs if name in _FIELDS}
    return found if len(found) == len(_FIELDS) else {}


def gpu_is_present() -> bool:
    """Whether an NVIDIA GPU answers."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and "GPU " in subprocess.run([tool, "-L"], capture_output=True, text=True).stdout


def gpu_name() -> str:
    """Index or UUID of the GPU that contestants get: the first that this shell may see."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def gpu_bytes_in_use() -> int:
    """Memory in use on that GPU, by whatever process."""
    command = ["nvidia-smi", f"--id={gpu_name()}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) << 20
