"""Which folders user code may come from: the working directory, and what is installed in this environment."""

import json
import site
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from urllib.parse import unquote, urlsplit

import raylign


def trusted_roots(project: Path) -> tuple[Path, ...]:
    """`project`, raylign, every site-packages folder and the checkouts installed as editable, links followed."""
    installed = [*site.getsitepackages(), *(sysconfig.get_path(name) for name in ("purelib", "platlib"))]
    if site.ENABLE_USER_SITE:
        installed.append(site.getusersitepackages())
    roots = [project, Path(str(raylign.__file__)).parent, *map(Path, installed), *_editable_checkouts(installed)]
    return tuple(dict.fromkeys(root.resolve() for root in roots))


def is_inside(file: str, roots: Sequence[Path]) -> bool:
    """Whether `file`, links followed, is below one of `roots`."""
    path = Path(file).resolve()
    return any(path.is_relative_to(root) for root in roots)


def _editable_checkouts(installed: list[str]) -> Iterator[Path]:
    """Not by the whole import path: a folder on PYTHONPATH could name any other."""
    for distribution in distributions(path=installed):
        url = _editable_url(distribution)
        if url.startswith("file:"):
            yield Path(unquote(urlsplit(url).path))


def _editable_url(distribution: Distribution) -> str:
    """By PEP 610; empty for packages that are installed by copy."""
    text = distribution.read_text("direct_url.json")
    if not text:
        return ""
    origin = json.loads(text)
    return str(origin["url"]) if origin.get("dir_info", {}).get("editable") else ""
