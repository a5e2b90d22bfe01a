"""Imports of large libraries: what they leave out, and that nothing else notices."""

import gc
import importlib
import subprocess
import sys

import pytest

from raylign.boundary.imports import lean_imports


def test_what_is_left_out_can_be_imported_afterwards() -> None:
    code = """
from raylign.boundary.imports import lean_imports
with lean_imports():
    import deepspeed, sys
    from transformers import AutoModelForCausalLM
assert not {"mlflow", "scipy", "sklearn"} & sys.modules.keys(), sys.modules.keys()
import mlflow, scipy, sklearn
print(mlflow.__name__, scipy.__name__, sklearn.__name__)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.endswith("mlflow scipy sklearn\n")


def test_what_is_loaded_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", gc)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with lean_imports():
        assert importlib.import_module("sklearn") is gc
        with pytest.raises(ImportError, match="mlflow"):
            importlib.import_module("mlflow")
    assert sys.modules["sklearn"] is gc and "mlflow" not in sys.modules


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_is_collected_again_as_before(collecting: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(ValueError, match="broken"), lean_imports():
            assert not gc.isenabled()
            raise ValueError("broken module")
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if before else gc.disable)()
