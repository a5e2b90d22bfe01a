"""How large libraries are imported where a process waits for them."""

import atexit
import email
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from email.parser import HeaderParser
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_UNUSED = ("mlflow", "scipy", "sklearn")
"""DeepSpeed imports mlflow for its autotuner, transformers sklearn for assisted generation and scipy to match boxes of
pictures, vLLM scipy to resample sound. Modules of ours that need one import it in their functions."""


@contextmanager
def lean_imports(*unused: str) -> Iterator[None]:
    """Imports inside do without `unused` and `_UNUSED`, which large libraries load only because they are installed.

    transformers reads the metadata of all installed packages: their headers, without the descriptions behind them. It
    reads the sources of all its models: once, not twice. `uncollected` too. What is loaded already is left as it is. A
    library that looked for a hidden one may remember for the rest of the process that it is not there.
    """
    hidden = [name for name in (*_UNUSED, *unused) if name not in sys.modules]
    parse = email.message_from_string
    email.message_from_string = _headers  # type: ignore[assignment] # it takes no options
    sys.meta_path.insert(0, _FindsTransformers)
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None makes an import of the name fail
    try:
        with uncollected():
            yield
    finally:
        for name in hidden:
            del sys.modules[name]
        sys.meta_path.remove(_FindsTransformers)
        email.message_from_string = parse


@contextmanager
def uncollected() -> Iterator[None]:
    """What imports make stays: garbage collection looks at it neither inside nor later, which would take seconds."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # nanobind complains of what is not collected in the end
        if collecting:
            gc.enable()


def _headers(text: str) -> Message:
    return HeaderParser().parsestr(text.partition("\n\n")[0])


class _FindsTransformers(MetaPathFinder):
    """Finds what transformers reads its models with."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "transformers.utils.import_utils":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _KeepsWhatItRead(spec.loader.name, spec.loader.path)
        return spec


class _KeepsWhatItRead(SourceFileLoader):
    """Transformers forgets the first of its models before it asks for all of them again.

    It looks at every line of them for the last that begins with `__all__`.
    """

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        name = "create_import_structure_from_path"
        if (read := getattr(getattr(module, name, None), "__wrapped__", None)) is not None:
            setattr(module, name, cache(read))
        if (exported := getattr(module, "fetch__all__", None)) is not None:
            vars(module)["fetch__all__"] = lambda text: exported(text[text.rfind("\n__all__") + 1 :])
