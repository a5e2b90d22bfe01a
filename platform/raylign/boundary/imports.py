"""How large libraries are imported where a process waits for them."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_UNUSED = ("mlflow", "scipy", "sklearn")
"""DeepSpeed imports mlflow for its autotuner, transformers sklearn for assisted generation and scipy to match boxes of
pictures, vLLM scipy to resample sound. Modules of ours that need one import it in their functions."""


@contextmanager
def lean_imports(*unused: str) -> Iterator[None]:
    """Imports inside do without `unused` and `_UNUSED`, which large libraries load only because they are installed.

    And without garbage collection: what an import makes stays. What is loaded already is left as it is. A library
    that looked for a hidden one may remember for the rest of the process that it is not there.
    """
    hidden = [name for name in (*_UNUSED, *unused) if name not in sys.modules]
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
