"""The head's Triton kernels without a GPU: their arithmetic in Triton's interpreter, and that Triton compiles them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from raylign.training.kernels import head

ROOT = Path(__file__).resolve().parents[4]
FOLDER = "tests.unit.training.kernels"


def in_a_process(*arguments: str, **variables: str) -> str:
    """The output of Python with these variables; fails with it."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_heads_own_tests_pass_in_tritons_interpreter() -> None:
    plugins = ("-p", "no:xdist", "-p", "no:cacheprovider", "-p", f"{FOLDER}.interpreted_head")
    tests = "tests/unit/training/kernels/test_head.py"
    found = in_a_process("-m", "pytest", "-q", *plugins, tests, TRITON_INTERPRET="1")
    assert "31 passed" in found


def test_the_kernels_compile_for_the_cards_that_they_are_for(tmp_path: Path) -> None:
    found = in_a_process("-m", f"{FOLDER}.compiled_head", TRITON_CACHE_DIR=str(tmp_path))
    assert found.split() == ["80", "90", "100"]


def logits(device: str) -> Tensor:
    with FakeTensorMode():
        return torch.empty(2, 8, device=device, dtype=torch.bfloat16)


@pytest.mark.parametrize("installed", [True, False])
def test_a_gpu_takes_them_where_triton_is_installed(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "find_spec", lambda name: object() if installed and name == "triton" else None)
    head._has_triton.cache_clear()
    assert head._fused(logits("cuda")) == installed and not head._fused(logits("cpu"))
    head._has_triton.cache_clear()
