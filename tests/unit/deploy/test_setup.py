"""The set-up script from its first line to its last, with small packages in place of the pinned ones; no network."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).resolve().parents[3]
UV = "0.13.9"
BACKEND = """\
import os, pathlib, shutil, torch

if getattr(torch, "sees_a_gpu", False) and "deepspeed" in WHEEL:
    assert os.environ["DS_IGNORE_CUDA_DETECTION"] == "1"
    assert pathlib.Path(os.environ["CUDA_HOME"], "bin", "nvcc").is_file()


def build_wheel(directory, *_):
    return pathlib.Path(shutil.copy(WHEEL, directory)).name


build_editable = build_wheel
"""
PROJECT = """\
[project]
name = "{}"
version = "1.0"
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
LIBRARIES = ("vllm/entrypoints/llm", "vllm/v1/engine/core", "ray", "mlflow", "transformers", "trl")


def wheel(folder: Path, name: str, files: Mapping[str, str], version: str = "1.0") -> Path:
    """A wheel of these files."""
    folder.mkdir(exist_ok=True)
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    content = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    content[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*content, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in content.items():
            entry = zipfile.ZipInfo(file)
            entry.external_attr = (0o100755 if "/scripts/" in file else 0o100644) << 16
            archive.writestr(entry, text)
    return path


def source(folder: Path, links: Path, name: str, files: Mapping[str, str]) -> None:
    """A project in `folder` whose build needs an installed torch and gives a wheel of these files."""
    folder.mkdir(exist_ok=True)
    built = wheel(links.with_name("built"), name, files)
    (folder / "pyproject.toml").write_text(PROJECT.format(name))
    (folder / "backend.py").write_text(f"WHEEL = {str(built)!r}\n{BACKEND}")


def packages(folder: Path) -> Path:
    """A folder for find-links with everything that a set-up installs but uv."""
    links = folder / "links"
    wheel(links, "torch", {"torch.py": ""}, "1.0+cpu")
    wheel(links, "libraries", {f"{name}.py": "" for name in LIBRARIES})
    source(folder / "deepspeed-1.0", links, "deepspeed", {"deepspeed.py": ""})
    (folder / "deepspeed-1.0" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 1.0\n")
    with tarfile.open(links / "deepspeed-1.0.tar.gz", "w:gz") as archive:
        archive.add(folder / "deepspeed-1.0", "deepspeed-1.0")
    return links


def uv_wheel(folder: Path, links: Path) -> None:
    """The uv of this environment under its own name, as a script that starts it."""
    real = Path(sys.executable).with_name("uv")
    script = f'#!/bin/sh\necho "$@" >>{folder}/uv-calls\nexec {real} "$@"\n'
    wheel(links, "uv", {f"uv-{UV}.data/scripts/uv": script}, UV)


def pin(links: Path, name: str, version: str = "") -> str:
    """The line of the list for a package."""
    file = sorted(links.glob(f"{name}-{version}*"))[-1]
    version = file.name.removesuffix(".tar.gz").split("-")[1]
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}\n"


def checkout(folder: Path, links: Path, uv: str) -> Path:
    """A checkout with a list of the small packages; returns the script."""
    shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    source(folder, links, "raylign", {"recipes/commands/cli.py": "", "actors/team.py": "", "raylign.py": ""})
    listed = "".join(pin(links, name) for name in ("torch", "libraries", "deepspeed")) + uv
    (folder / "deploy" / "requirements-cpu.txt").write_text(listed)
    return folder / "deploy" / "setup.sh"


def set_up(script: Path, links: Path, device: str = "cpu") -> subprocess.CompletedProcess[str]:
    """Runs the script with the folder as pip's only source of packages."""
    settings = {
        "PYTHON": sys.executable,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(links),
        "UV_CACHE_DIR": str(links.with_name("uv-cache")),
        "UV_NO_CONFIG": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "PYTHON"))}
    return subprocess.run(
        [str(script), "--device", device], env=kept | settings, capture_output=True, text=True, timeout=550
    )


def installed(folder: Path) -> set[str]:
    """Files of the packages that lie in the .venv."""
    [site] = (folder / ".venv" / "lib").glob("python3*/site-packages")
    names = ("torch.py", "deepspeed.py", "vllm/v1/engine/core.py", "recipes/commands/cli.py")
    return {name for name in names if (site / name).is_file()}


ALL = {"torch.py", "deepspeed.py", "vllm/v1/engine/core.py", "recipes/commands/cli.py"}


def test_uv_refuses_a_file_with_another_hash_and_the_next_set_up_goes_on(tmp_path: Path) -> None:
    links = packages(tmp_path)
    uv_wheel(tmp_path, links)
    clone = tmp_path / "clone"
    script = checkout(clone, links, pin(links, "uv"))
    requirements = clone / "deploy" / "requirements-cpu.txt"
    good = requirements.read_text()
    requirements.write_text(good.replace(pin(links, "torch"), f"torch==1.0+cpu --hash=sha256:{'0' * 64}\n"))
    refused = set_up(script, links)
    assert refused.returncode == 1
    assert "could not install torch==1.0+cpu" in refused.stderr
    assert "uv could not" in refused.stdout, "pip gets its try"
    assert installed(clone) == set()

    requirements.write_text(good)
    done = set_up(script, links)
    assert done.returncode == 0, done.stdout + done.stderr
    assert installed(clone) == ALL
    assert "pip goes on" not in done.stdout
    calls = (tmp_path / "uv-calls").read_text()
    assert str(links) not in calls, "sources, which may hold passwords, are handed over in the environment"
    assert calls.count("--require-hashes") >= 3
    [site] = (clone / ".venv" / "lib").glob("python3*/site-packages")
    assert list(site.glob("vllm/v1/engine/__pycache__/core.*.pyc")), "loaded once, with its bytecode kept"
    assert set_up(script, links).stdout.startswith("setup: .venv is up to date")


def test_pip_installs_everything_where_uv_cannot_be_had(tmp_path: Path) -> None:
    links = packages(tmp_path)
    clone = tmp_path / "clone"
    good = pin(links, "libraries")
    wheel(links, "libraries", {f"{name}.py": "raise OSError('libgone.so: no such file')" for name in LIBRARIES}, "0.9")
    broken = pin(links, "libraries", "0.9")
    script = checkout(clone, links, f"uv=={UV} --hash=sha256:{'0' * 64}\n")
    requirements = clone / "deploy" / "requirements-cpu.txt"
    requirements.write_text(requirements.read_text().replace(good, broken))
    failed = set_up(script, links)
    assert failed.returncode == 1
    assert "libgone.so: no such file" in failed.stderr
    assert "what was installed does not import" in failed.stderr

    requirements.write_text(requirements.read_text().replace(broken, good))
    done = set_up(script, links)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not to be had from this machine's package sources: pip installs the rest" in done.stdout
    assert installed(clone) == ALL
    assert not (clone / ".venv" / "bin" / "uv").exists()


def test_deepspeed_finds_the_compiler_that_is_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a CUDA toolkit, whose torch sees a GPU."""
    if shutil.disk_usage(tmp_path).free < 20 << 30:
        pytest.skip("a set-up for GPUs asks for 20 GiB of disk")
    links = packages(tmp_path)
    wheel(links, "torch", {"torch.py": "sees_a_gpu = True"}, "1.0+cpu")
    wheel(links, "nvcc", {"nvidia/cu13/bin/nvcc": ""})
    clone, tools = tmp_path / "clone", tmp_path / "tools"
    script = checkout(clone, links, f"uv=={UV} --hash=sha256:{'0' * 64}\n" + pin(links, "nvcc"))
    (clone / "deploy" / "requirements-cpu.txt").rename(clone / "deploy" / "requirements-gpu.txt")
    tools.mkdir()
    for folder in map(Path, ("/usr/bin", "/bin")):
        for tool in folder.iterdir():
            if not tool.name.startswith("nv") and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    done = set_up(script, links, "gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert installed(clone) == ALL


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_lists_pin_the_uv_that_these_tests_start(device: str) -> None:
    assert f"\nuv=={UV} --hash" in (ROOT / "deploy" / f"requirements-{device}.txt").read_text()
