"""Imports of large libraries: what they leave out, and that nothing else notices."""

import email
import gc
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import transformers.models
import transformers.utils
from transformers.utils import import_utils

from raylign.boundary.imports import lean_imports


def test_what_is_left_out_can_be_imported_afterwards() -> None:
    code = """
from raylign.boundary.imports import lean_imports
with lean_imports("bitsandbytes"):
    import deepspeed, sys
    from peft.import_utils import is_bnb_4bit_available
    from transformers import AutoModelForCausalLM
    is_bnb_4bit_available()
import peft, torch
peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
assert "bitsandbytes" not in sys.modules, "an adapter looks for it once, as ranks rely on"
assert not {"mlflow", "scipy", "sklearn"} & sys.modules.keys(), sys.modules.keys()
import mlflow, scipy, sklearn
print(mlflow.__name__, scipy.__name__, sklearn.__name__)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.endswith("mlflow scipy sklearn\n")
    assert "leaked" not in child.stderr


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


def test_what_imports_made_is_not_looked_at_again() -> None:
    made: list[list[object]] = []
    with lean_imports():
        made.append([])
    assert not any(found is made[0] for found in gc.get_objects()) and gc.get_freeze_count()
    gc.unfreeze()
    seen = any(found is made[0] for found in gc.get_objects())
    gc.freeze()  # as it was: for the tests that this process runs next
    assert seen


def test_packages_are_known_by_the_headers_of_their_metadata() -> None:
    parse, known = email.message_from_string, importlib.metadata.packages_distributions()
    with lean_imports():
        assert importlib.metadata.packages_distributions() == known and email.message_from_string is not parse
        assert importlib.metadata.metadata("pytest")["Name"] == "pytest"
    assert email.message_from_string is parse


def test_transformers_reads_its_models_once_and_finds_the_same() -> None:
    with lean_imports():
        [finder, *_] = sys.meta_path
        spec = finder.find_spec(import_utils.__name__, transformers.utils.__path__)
    assert finder not in sys.meta_path and spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    models = transformers.models.__path__[0]
    read = found.create_import_structure_from_path(models)
    assert read == import_utils.create_import_structure_from_path(models) and len(read) > 128
    before = found.create_import_structure_from_path.cache_info().misses
    assert found.create_import_structure_from_path(f"{models}/albert") is read["albert"]
    assert found.create_import_structure_from_path.cache_info().misses == before
