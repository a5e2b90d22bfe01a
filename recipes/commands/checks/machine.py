"""The outcome of one check, and the checks of this machine."""

import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "fail"]

GIB = 1 << 30
LEAST_CORES = 2
LEAST_MEMORY = 8 * GIB
"""A vLLM engine with 2 GiB of KV cache takes about 5 GiB, a trainer rank of the default model 1 to 2 GiB."""
LEAST_DISK = 5 * GIB
RAY_FULL = 0.95
"""Ray stops spilling objects when its disk is fuller than this."""
DEFAULT_WEIGHTS = 270_000_000
"""Bytes of embedded:smollm2-135m in bfloat16, which each publish writes to shared memory."""
SHARED_MEMORY = Path("/dev/shm")
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Check:
    """What was found, and the cure unless it is `ok`. `fail`: a run cannot work; `warn`: some runs will not."""

    name: str
    status: Status
    found: str
    cure: str = ""


def machine_checks() -> list[Check]:
    """Everything but GPUs, in the order of the table."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        cores_check(os.cpu_count() or 1, len(os.sched_getaffinity(0)), _text(_CGROUP / "cpu.max")),
        memory_check(memory, _text(_CGROUP / "memory.max")),
        bf16_check(_text(Path("/proc/cpuinfo"))),
        compiler_check(),
        shared_memory_check(shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0),
    ]


def cores_check(cores: int, allowed: int, cpu_max: str) -> Check:
    """`cpu_max` is cgroup v2's `quota period` in microseconds; `max` means no quota."""
    quota, _, period = cpu_max.partition(" ")
    share = int(quota) / int(period) if quota.isdigit() and period.isdigit() else float(allowed)
    usable = min(float(allowed), share)
    if usable < LEAST_CORES:
        cure = "the default recipe needs 2; set placement.generator_cpus=1 and placement.trainer_cpus=1"
        return Check("CPU cores", "warn", f"{usable:g} usable of {cores}", cure)
    if usable < cores:
        cure = "Ray counts all cores; keep what `raylign plan` requires within the usable ones"
        return Check("CPU cores", "warn", f"{usable:g} usable of {cores}", cure)
    return Check("CPU cores", "ok", str(cores))


def memory_check(physical: int, memory_max: str) -> Check:
    """`memory_max` is cgroup v2's limit in bytes, or `max`."""
    usable = min(physical, int(memory_max)) if memory_max.isdigit() else physical
    if usable >= LEAST_MEMORY:
        return Check("memory", "ok", f"{usable / GIB:.0f} GiB")
    cure = "lower generators.kv_cache_gb and keep placement.mode=colocated with one generator"
    return Check("memory", "warn", f"{usable / GIB:.1f} GiB, the default recipe takes up to 8", cure)


def bf16_check(cpuinfo: str) -> Check:
    words = set(cpuinfo.split())
    found = [flag for flag in BF16_FLAGS if flag in words]
    if found:
        return Check("CPU bfloat16", "ok", ", ".join(found))
    cure = "bfloat16 is emulated on the CPU; model.dtype=float32 may be faster"
    return Check("CPU bfloat16", "warn", "no such instructions", cure)


def compiler_check() -> Check:
    """What PyTorch compiles with; only vLLM without `enforce_eager` asks for it."""
    compiler = os.environ.get("CXX", "c++")
    # Actors find programs beside the interpreter, too.
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [name for name in (compiler, "ninja") if shutil.which(name, path=path) is None]
    missing += [] if headers.is_file() else [str(headers)]
    if not missing:
        return Check("compiler", "ok", f"{compiler}, ninja, Python headers")
    cure = "apt-get install g++ python3-dev; pip install ninja"
    return Check("compiler", "warn", f"missing: {', '.join(missing)}; generators.enforce_eager=false needs it", cure)


def shared_memory_check(free: int) -> Check:
    if free >= DEFAULT_WEIGHTS:
        return Check("shared memory", "ok", f"{SHARED_MEMORY}: {megabytes(free)} free")
    cure = "docker run --shm-size=8g; on Kubernetes an emptyDir with medium: Memory at /dev/shm"
    found = f"{SHARED_MEMORY}: {megabytes(free)} free, the default model's weights take {megabytes(DEFAULT_WEIGHTS)}"
    return Check("shared memory", "warn", found, cure)


def disk_checks(cache: Path) -> list[Check]:
    """Room for runs here, for made models in `cache`, and for Ray's session."""
    ray = Path(os.environ.get("RAY_TMPDIR", "/tmp"))
    return [
        disk_check("disk for runs", Path("runs"), "set run.dir to a larger disk"),
        disk_check("disk for models", cache, "set RAYLIGN_CACHE to a folder on a larger disk"),
        disk_check("disk for Ray", ray, "set RAY_TMPDIR to a short path on a larger disk", fullest=RAY_FULL),
    ]


def disk_check(name: str, folder: Path, cure: str, fullest: float = 1.0) -> Check:
    """Room at `folder`, which need not exist yet."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    usage = shutil.disk_usage(place)
    found = f"{folder.absolute()}: {usage.free / GIB:.1f} GiB free"
    if not os.access(place, os.W_OK):
        return Check(name, "fail", f"{place} is not writable", cure)
    if usage.free < LEAST_DISK:
        return Check(name, "warn", f"{found}, less than {LEAST_DISK / GIB:g}", cure)
    if 1 - usage.free / usage.total > fullest:
        return Check(name, "warn", f"{found}, more than {fullest:.0%} used, where Ray stops spilling", cure)
    return Check(name, "ok", found)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _text(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
