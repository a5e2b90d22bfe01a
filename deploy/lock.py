"""Writes the hashes of the pinned lists: `.venv/bin/python deploy/lock.py` after any change of a version.

Each pin of `requirements-cpu.txt` and `requirements-gpu.txt` gets the SHA-256 of every file that a set-up may install:
the wheels for CPython 3.11, 3.12 and 3.13 on Linux x86_64 with glibc, and of a package without wheels its source. uv
reads them from the index (PyPI, unless UV_DEFAULT_INDEX names another); nothing is downloaded but metadata. Comments,
order and versions stay as they are.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.tags import Tag
from packaging.utils import canonicalize_name, parse_wheel_filename

DEPLOY = Path(__file__).resolve().parent
LISTS = ("requirements-cpu.txt", "requirements-gpu.txt")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYTHONS = (11, 12, 13)
PIN = re.compile(
    r"(?P<pin>(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.+!]+))(?P<hashes>( --hash=sha256:[0-9a-f]{64})*)"
)


class LockError(Exception):
    """The lists could not be renewed; they are as they were."""


def installs(tag: Tag) -> bool:
    """Whether a wheel with this tag goes into CPython 3.11 to 3.13 on Linux x86_64 with glibc."""
    if tag.platform != "any" and not re.fullmatch(r"(many)?linux\w*_x86_64", tag.platform):
        return False
    kind, digits = re.fullmatch(r"([a-z]+)(\d*)", tag.interpreter).groups()  # type: ignore[union-attr]
    if kind == "py":
        return digits[0] == "3" and (len(digits) == 1 or int(digits[1:]) <= max(PYTHONS))
    if kind != "cp" or digits[0] != "3":
        return False
    minor = int(digits[1:] or 0)
    return minor in PYTHONS if tag.abi == f"cp{digits}" else tag.abi in ("abi3", "none") and minor <= max(PYTHONS)


def hashes(package: Mapping[str, Any]) -> list[str]:
    """The SHA-256 of the files of one package of a pylock file that a set-up may install, sorted."""
    wheels = {file_name(wheel): wheel["hashes"]["sha256"] for wheel in package.get("wheels", ())}
    chosen = {digest for name, digest in wheels.items() if any(map(installs, parse_wheel_filename(name)[3]))}
    if not wheels:
        chosen = {package["sdist"]["hashes"]["sha256"]}
    if not chosen:
        raise LockError(
            f"{package['name']} {package['version']} has no wheel for Linux x86_64 and CPython 3.11 to 3.13"
        )
    return sorted(chosen)


def file_name(wheel: Mapping[str, Any]) -> str:
    """The wheel's file name, which a pylock file may leave to the address."""
    return str(wheel.get("name") or unquote(urlsplit(wheel["url"]).path).rpartition("/")[2])


def ask_index(pins: Sequence[str], *options: str) -> dict[str, list[str]]:
    """Canonical name -> hashes of these pins."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, lock = Path(folder, "pins.txt"), Path(folder, "pylock.toml")
        wanted.write_text("\n".join(pins) + "\n")
        command = ["uv", "pip", "compile", "--no-deps", "--universal", "--python-version", f"3.{PYTHONS[0]}", "--quiet"]
        done = subprocess.run(
            [str(Path(sys.executable).with_name(command[0])), *command[1:], *options, str(wanted), "-o", str(lock)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise LockError(done.stderr.strip())
        packages = tomllib.loads(lock.read_text())["packages"]
    return {canonicalize_name(package["name"]): hashes(package) for package in packages}


def cpu_torch(pin: str, kept: Sequence[str]) -> list[str]:
    """The hashes of a +cpu build, which PyPI lacks; `kept`, those of the list, where its index is out of reach."""
    try:
        return ask_index([pin], "--default-index", TORCH_CPU_INDEX)["torch"]
    except LockError as error:
        if not kept:
            raise LockError(
                f"{error}\n{pin} comes from {TORCH_CPU_INDEX} alone. Run this where that address can be reached, or "
                f"write the hashes that {TORCH_CPU_INDEX}/torch/ names into the list by hand"
            ) from error
        print(f"lock: {TORCH_CPU_INDEX} is out of reach; {pin} keeps its hashes, which are right if its version is old")
        return list(kept)


def renew(path: Path) -> str:
    """The text of one list with the hashes of today's index."""
    lines = path.read_text().splitlines()
    found = {number: match for number, line in enumerate(lines) if (match := PIN.fullmatch(line))}
    pins = {canonicalize_name(match["name"]): match for match in found.values()}
    elsewhere = {name for name, match in pins.items() if "+" in match["version"]}
    digests = ask_index([match["pin"] for name, match in pins.items() if name not in elsewhere])
    for name in elsewhere:
        digests[name] = cpu_torch(pins[name]["pin"], re.findall("[0-9a-f]{64}", pins[name]["hashes"]))
    for number, match in found.items():
        options = [f"--hash=sha256:{digest}" for digest in digests[canonicalize_name(match["name"])]]
        lines[number] = " ".join([match["pin"], *options])
    return "\n".join(lines) + "\n"


def main() -> int:
    try:
        texts = {DEPLOY / name: renew(DEPLOY / name) for name in LISTS}
    except LockError as error:
        print(f"lock: error: {error}", file=sys.stderr)
        return 1
    for path, text in texts.items():
        changed = sum(old != new for old, new in zip(path.read_text().splitlines(), text.splitlines(), strict=True))
        path.write_text(text)
        print(f"lock: deploy/{path.name}: {changed} lines renewed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
