"""How large libraries are imported where a process waits for them."""

import atexit
import email
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import HeaderParser

_UNUSED = ("mlflow", "scipy", "sklearn")
"""DeepSpeed imports mlflow for its autotuner, transformers sklearn for assisted generation and scipy to match boxes of
pictures, vLLM scipy to resample sound. Modules of ours that need one import it in their functions."""


@contextmanager
def lean_imports(*unused: str) -> Iterator[None]:
    """Imports inside do without `unused` and `_UNUSED`, which large libraries load only because they are installed.

    transformers reads the metadata of all installed packages: their headers, without the descriptions behind them.
    `uncollected` too. What is loaded already is left as it is. A library that looked for a hidden one may remember for
    the rest of the process that it is not there.
    """
    hidden = [name for name in (*_UNUSED, *unused) if name not in sys.modules]
    parse = email.message_from_string
    email.message_from_string = HeaderParser().parsestr  # type: ignore[assignment] # it takes no options
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None makes an import of the name fail
    try:
        with uncollected():
            yield
    finally:
        for name in hidden:
            del sys.modules[name]
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
