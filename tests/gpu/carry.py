"""The packages that `one_gpu.py` needs on a machine without a package index, as a folder that is small enough to carry.

    python tests/gpu/carry.py make wheels                  # here, where pip works; fails above 64 MiB
    python3 tests/gpu/carry.py install wheels /tmp/site    # there
    PYTHONPATH=/tmp/site python3 tests/gpu/one_gpu.py

What is there already in the version that is needed, or a later one, is not installed again. DeepSpeed travels as source
and is built there, without its CUDA operations, which raylign calls none of.
"""

import argparse
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version

SOURCES = ("deepspeed==0.19.8",)
WHEELS = (
    *("annotated-types", "detect-secrets==1.5.0", "hjson", "pydantic==2.14.3", "pydantic-core==2.50.4"),
    *("typing-inspection", "typing-extensions", "filelock", "jinja2", "markupsafe", "pyyaml"),
    *("einops", "msgpack", "ninja", "packaging", "psutil", "py-cpuinfo", "tqdm"),
    *("accelerate", "datasets==5.2.0", "dill<0.4.2", "liger-kernel", "multiprocess<0.70.20", "trl==1.16.0", "xxhash"),
    *("bitsandbytes==0.50.2", "rich", "markdown-it-py", "mdurl", "pygments"),
)
"""What raylign's trainer, DeepSpeed, TRL and its benchmark import beyond torch, transformers, peft and numpy. TRL also
needs pyarrow and pandas, which are too large for all to travel: where they are missing, TRL is not measured."""
CUT = "bitsandbytes"
LIMIT = 64 << 20
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
_CUDA = "130"


def main() -> int:
    asked = _arguments()
    folder = Path(asked.folder)
    if asked.what == "make":
        download(folder, asked.python)
        cut(folder, asked.cuda)
        return told_size(folder)
    install(folder, Path(asked.target))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    make = commands.add_parser("make", help="download into a folder")
    make.add_argument("folder")
    make.add_argument("--python", default="3.12", help="of the machine with the GPU")
    make.add_argument(
        "--cuda", default=_CUDA, help="of torch there, without the dot: the library of bitsandbytes to keep"
    )
    there = commands.add_parser("install", help="install from the folder")
    there.add_argument("folder")
    there.add_argument("target", help="folder for PYTHONPATH")
    return parser.parse_args()


def download(folder: Path, python: str) -> None:
    """Sources and wheels for `python` on x86-64 Linux, without what they need: all of that is named."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder)]
    # DeepSpeed's set-up asks for torch, which is not needed to read its name.
    source = ["--no-binary=:all:", "--no-build-isolation", *SOURCES]
    subprocess.run([*pip, *source], check=True, env=os.environ | build_environment())
    places = [word for name in _PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    wheel = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *places]
    subprocess.run([*pip, *wheel, *WHEELS], check=True)


def build_environment() -> dict[str, str]:
    """DeepSpeed without a CUDA toolkit: it would refuse to be set up where it finds none."""
    return {"DS_BUILD_OPS": "0", "DS_IGNORE_CUDA_DETECTION": "1"}


def cut(folder: Path, cuda: str) -> None:
    """Leave out of bitsandbytes the libraries of other accelerators and CUDA versions."""
    for path in folder.glob(f"{CUT}-*.whl"):
        small = path.with_suffix(".small")
        with zipfile.ZipFile(path) as whole, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as kept:
            names = [name for name in whole.namelist() if keeps(name, cuda)]
            if not any(f"cuda{cuda}" in name for name in names):
                raise SystemExit(f"{path.name} has no library for CUDA {cuda}; give another with --cuda")
            for name in names:
                data = whole.read(name)
                kept.writestr(name, _record(data, names) if name.endswith(".dist-info/RECORD") else data)
        small.replace(path)


def keeps(name: str, cuda: str) -> bool:
    """Whether a file of bitsandbytes' wheel is needed: Python, and the libraries for CPUs and this CUDA version."""
    library = re.search(r"libbitsandbytes_(\w+)\.so$", name)
    return library is None or library[1] in ("cpu", f"cuda{cuda}")


def _record(data: bytes, names: Sequence[str]) -> bytes:
    """The wheel's list of files without those that are gone."""
    lines = data.decode().splitlines()
    return "".join(f"{line}\n" for line in lines if line.split(",")[0] in names).encode()


def told_size(folder: Path) -> int:
    """Shows what is in the folder; 1 when it is too much."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    for name, size in sizes.items():
        print(f"{size / 2**20:8.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:8.2f} MiB in all, {LIMIT / 2**20:.0f} MiB are allowed")
    return 1 if total > LIMIT else 0


def install(folder: Path, target: Path) -> None:
    """What is missing here goes to `target`; DeepSpeed is built."""
    missing = [path for path in sorted(folder.iterdir()) if is_missing(path.name)]
    print("\n".join(["installing", *(f"  {path.name}" for path in missing)]))
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        words = ["--no-cache-dir", "--no-build-isolation", "--upgrade", "--target", str(target), *map(str, missing)]
        subprocess.run([*pip, *words], check=True, env=os.environ | build_environment())


def is_missing(file: str) -> bool:
    """Whether the distribution of a wheel or source archive is not installed here, or in an older version."""
    name, carried = re.sub(r"\.tar\.gz$", "", file).split("-")[:2]
    try:
        return Version(version(name)) < Version(carried)
    except PackageNotFoundError:
        return True


if __name__ == "__main__":
    sys.exit(main())
