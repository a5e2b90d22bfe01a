"""Code of users, named `module:name`: where it may come from, and how it is imported.

Scoring functions run in processes of their own (`raylign.scoring.worker`); recipes and losses of users run in ours,
losses in the trainers' actors on whatever node.
"""

import importlib
import importlib.util
import json
import re
import site
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from urllib.parse import unquote, urlsplit

import raylign
from raylign.errors import ConfigError

_KEPT: list[Path] = []
NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""The form `module:name`."""


def import_named(spec: str, option: str) -> object:
    """The object `module:name`, imported from the working directory or an installed package; its module's code runs.

    Raises ConfigError, naming `option`, when it is elsewhere or not there.
    """
    module, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.util.find_spec(module.partition(".")[0])
        if found is None or not found.origin or not is_inside(found.origin, trusted_roots(Path.cwd())):
            raise ConfigError(
                f"{option}={spec}: no module {module!r} in the working directory or installed; correct it"
            )
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{option}={spec} cannot be imported: {error}") from error
    if name not in dir(imported):
        raise ConfigError(f"{option}={spec}: {imported.__file__} has no {name!r}; correct the name")
    return getattr(imported, name)


def trust_kept(folder: Path) -> None:
    """Let imports of this process come from `folder`: a run's own copy of the code that it began with."""
    _KEPT.append(folder)


def trusted_roots(project: Path) -> tuple[Path, ...]:
    """`project`, raylign, every site-packages folder and the checkouts installed as editable, links followed.

    Kept copies of a run's code too, in the process that was given them.
    """
    installed = [*site.getsitepackages(), *(sysconfig.get_path(name) for name in ("purelib", "platlib"))]
    if site.ENABLE_USER_SITE:
        installed.append(site.getusersitepackages())
    own = [project, *_KEPT, Path(str(raylign.__file__)).parent]
    roots = [*own, *map(Path, installed), *_editable_checkouts(installed)]
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
