"""How large libraries are imported where a process waits for them."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_UNUSED = ("mlflow", "sklearn")
"""DeepSpeed imports the one for its autotuner, transformers the other for assisted generation."""


@contextmanager
def lean_imports() -> Iterator[None]:
    """Imports inside do without `_UNUSED`, which these libraries load only because they are installed.

    And without garbage collection: what an import makes stays. What is loaded already is left as it is.
    """
    hidden = [name for name in _UNUSED if name not in sys.modules]
    collecting = gc.isenabled()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None makes an import of the name fail
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if collecting:
            gc.enable()
