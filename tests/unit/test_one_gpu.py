"""The script for one GPU, as far as it runs without: all of it on small shapes, and what its parts decide."""

import inspect
import json
import math
import os
import re
import subprocess
import sys
import time
import zipfile
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from raylign.config import parse_config
from raylign.errors import ConfigError
from raylign.training.kernels.attention_blocked import blocked_attention
from raylign.training.kernels.head import linear_scores
from tests.gpu import carry, ipc, kernels, one_gpu, stubs, zero_cases
from tests.gpu.rows import Row, Sheet, read_rows, table
from tests.gpu.stage import Stage

SCRIPT = Path(one_gpu.__file__)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(torch.device("cpu"), True, tmp_path, Sheet(tmp_path / "rows.jsonl", "test", 600))


def rows_of(stage: Stage) -> dict[str, Row]:
    return {row.what: row for row in read_rows(stage.folder / "rows.jsonl")}


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_all_that_needs_no_gpu_runs_and_holds(tmp_path: Path) -> None:
    """In a process of its own, which knows no Ray."""
    out = tmp_path / "found.json"
    done = run_script("--device", "cpu", "--tiny", "--out", str(out), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    found = json.loads(out.read_text())
    rows = [Row(**row) for row in found["rows"]]
    passed = {row.group for row in rows if row.verdict == "PASS"}
    assert passed == {"kernels", "speed-full", "zero", "handover", "ipc"}
    assert {row.what for row in rows if row.verdict == "SKIP"} == {
        "what leaves the GPU and comes back",
        "memory of a QLoRA step",
        "float16",
        "weights by CUDA's handles",
    }
    measured = {row.what for row in rows if row.verdict == "INFO" and row.value}
    assert {"raylign full, tiny", "TRL full, tiny", "full, tiny: real tokens/s, times TRL's best"} <= measured
    assert table(rows) in done.stdout


def test_a_group_has_a_process_and_its_end_is_told(tmp_path: Path) -> None:
    end = time.monotonic() + 600
    one_gpu.in_process(one_gpu.Group("ipc", 0, 600), "cpu", True, tmp_path, end)
    one_gpu.in_process(one_gpu.Group("zero", 0, 60), "cpu", False, tmp_path, end)
    one_gpu.in_process(one_gpu.Group("trl-full", 700, 800), "cpu", True, tmp_path, end)
    rows = {(row.group, row.what): row for row in read_rows(tmp_path / "rows.jsonl")}
    assert rows["ipc", "weights by shared memory: the same"].verdict == "PASS"
    assert rows["ipc", "the whole group"].verdict == "INFO"
    assert rows["zero", "the whole group"].note.startswith("ended with status 2")
    assert rows["trl-full", "the whole group"].verdict == "SKIP"


def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    done = run_script("--out", str(tmp_path / "none.json"), PATH=str(tmp_path))
    assert done.returncode == 2 and "not measured: no NVIDIA GPU" in done.stdout
    assert not (tmp_path / "none.json").exists()


def test_a_row_is_judged_and_told(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = stage.sheet
    assert sheet.require("at its limit", 2.0, "at most", 2.0) and sheet.require("above", 3.0, "at least", 2.0)
    assert not sheet.require("too little", 1.0, "at least", 2.0)
    assert not sheet.require("none", float("nan"), "at most", 1)
    with sheet.trying("what raises"):
        raise RuntimeError("CUDA error:\n an illegal memory access")
    assert not sheet.has_time("a long one", 10_000) and sheet.has_time("a short one", 1)
    found = rows_of(stage)
    verdicts = {name: row.verdict for name, row in found.items()}
    assert verdicts == {
        **{"at its limit": "PASS", "above": "PASS", "too little": "FAIL", "none": "FAIL"},
        **{"what raises": "FAIL", "a long one": "SKIP"},
    }
    assert found["none"].value is None and found["none"].note == "nan"
    assert found["what raises"].note == "RuntimeError: CUDA error: an illegal memory access"
    lines = table(list(found.values())).splitlines()
    assert len(lines) == 2 + len(found) and "at least 2" in lines[4] and capsys.readouterr().out


def test_kernels_that_are_wrong_do_not_pass(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention without windows, and a head whose log-probs are 1 % off."""

    def without_window(*given: Any) -> Tensor:
        query, key, value, segments, scaling, _ = given
        return blocked_attention(query, key, value, segments, scaling, None)

    def off(*given: Tensor) -> Any:
        found = linear_scores(*given)
        return found._replace(logps=found.logps * 1.01)

    monkeypatch.setattr("raylign.training.kernels.attention.blocked_attention", without_window)
    monkeypatch.setattr("tests.gpu.kernels.linear_scores", off)
    kernels._check_model(stage, "mistral", "fp32", torch.float32)
    kernels._check_head(stage, "fp32", torch.float32)
    found = {what: row.verdict for what, row in rows_of(stage).items()}
    assert found["mistral fp32: the layout check keeps shared rows"] == "FAIL"
    for layout in ("shared", "packed"):
        assert found[f"mistral fp32 {layout}: log-probs from eager"] == "FAIL"
        assert found[f"mistral fp32 {layout}: gradients from eager"] == "FAIL"
    assert found["head fp32: log-probs from log_softmax, mean"] == "FAIL"
    assert found["head fp32: entropies from log_softmax, mean"] == "PASS"


def test_all_that_the_configuration_takes_is_a_case() -> None:
    for stage, dtype, way in product(range(4), ("bfloat16", "float32", "float16"), zero_cases.MODELS):
        case = zero_cases.Case(stage, dtype, way)
        recipe = {
            "model": {"dtype": dtype, **zero_cases.MODELS[way]},
            "trainer": {"zero_stage": stage, **zero_cases.TRAINERS[way]},
        }
        if case in zero_cases.ALL:
            parse_config(recipe)
        else:
            with pytest.raises(ConfigError, match="load_in_4bit|offload"):
                parse_config(recipe)
    assert len(set(zero_cases.ALL)) == len(zero_cases.ALL) and set(zero_cases.TINY) < set(zero_cases.ALL)


def test_weights_are_packed_as_vllm_packs_them() -> None:
    parameters = list(inspect.signature(rebuild_cuda_tensor).parameters)
    assert parameters[ipc._DEVICE_ARGUMENT] == "storage_device"
    vllm = find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    packing = Path(vllm.origin).parent / "distributed/weight_transfer/packed_tensor.py"
    size = re.search(r"^DEFAULT_PACKED_BUFFER_SIZE_BYTES = ([\d *]+)", packing.read_text(), re.MULTILINE)
    assert size is not None and math.prod(map(int, size[1].split(" * "))) == ipc._BUFFER
    weights = {
        name: torch.zeros(length, dtype=torch.bfloat16) for name, length in (("a", 3), ("b", 9), ("c", 2), ("d", 2))
    }
    assert list(ipc.chunks(weights, 10)) == [("a",), ("b",), ("c", "d")]


def test_only_the_needed_part_of_a_wheel_is_carried(tmp_path: Path) -> None:
    path = tmp_path / "bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl"
    libraries = [
        f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda128", "cuda130", "rocm72", "xpu2026")
    ]
    record = "bitsandbytes-0.50.2.dist-info/RECORD"
    names = ["bitsandbytes/__init__.py", *libraries, record]
    with zipfile.ZipFile(path, "w") as wheel:
        for name in names[:-1]:
            wheel.writestr(name, "content")
        wheel.writestr(record, "".join(f"{name},sha256=x,7\n" for name in names))
    carry.cut(tmp_path, "130")
    kept = ["bitsandbytes/__init__.py", libraries[0], libraries[2], record]
    with zipfile.ZipFile(path) as wheel:
        assert wheel.namelist() == kept and wheel.testzip() is None
        assert [line.split(",")[0] for line in wheel.read(record).decode().splitlines()] == kept
    with pytest.raises(SystemExit, match="no library for CUDA 118"):
        carry.cut(tmp_path, "118")


def test_what_is_too_large_or_there_already_is_not_carried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some-1.0-py3-none-any.whl").write_bytes(bytes(100))
    assert carry.told_size(tmp_path) == 0
    monkeypatch.setattr(carry, "LIMIT", 99)
    assert carry.told_size(tmp_path) == 1 and "in all" in capsys.readouterr().out
    here = torch.__version__.split("+")[0]
    assert not carry.is_missing(f"torch-{here}-cp312-cp312-linux_x86_64.whl")
    assert carry.is_missing("torch-99.0-cp312-cp312-linux_x86_64.whl")
    assert carry.is_missing("no_such_package-1.0.tar.gz")


def test_the_stand_ins_have_names_that_ray_has() -> None:
    for module, values in stubs._NAMES.items():
        assert not values.keys() - set(dir(import_module(module))) - {"get_node_ip_address"}
    assert callable(ray.util.get_node_ip_address)


def test_every_group_can_be_asked_for() -> None:
    names = {group.name for group in one_gpu.GROUPS}
    assert names >= set(one_gpu._TINY) and names - set(one_gpu._TINY) == {"speed-lora", "trl-lora"}
    source = inspect.getsource(one_gpu.check_group)
    assert all(f'"{name}"' in source for name in names)
