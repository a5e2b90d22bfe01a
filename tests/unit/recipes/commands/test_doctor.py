"""Each check's verdict, and a real look at this machine."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from raylign.errors import PlacementError
from recipes.commands import doctor
from recipes.commands.checks import accelerators, machine
from recipes.commands.checks.accelerators import (
    Probe,
    engine_check,
    gpu_check,
    model_checks,
    of_extra,
    package_checks,
    probe,
    python_check,
    requirement_check,
)
from recipes.commands.checks.machine import Check, Status
from recipes.commands.checks.ray_cluster import JOB, mlflow_check, ray_checks, require_named_cluster, token_check
from recipes.commands.cli import app

GIB = 1 << 30


def test_this_machine_can_run_raylign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    for name in (
        "Python",
        "torch",
        "vllm",
        "compiler",
        "shared memory",
        "GPUs",
        "disk for runs",
        "Ray token",
        "MLflow",
    ):
        assert f" {name} " in result.stdout
    assert "0 that stop a run" in result.stdout


@pytest.mark.parametrize(("statuses", "code"), [(["ok", "warn"], 0), (["ok", "fail", "warn"], 1)])
def test_only_a_failed_check_gives_status_1(monkeypatch: pytest.MonkeyPatch, statuses: list[Status], code: int) -> None:
    checks = [Check("[red]x[/red]", status, "found", "the cure") for status in statuses]
    monkeypatch.setattr(doctor, "examine", lambda uri: checks)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == code
    assert "[red]x[/red]" in result.stdout and "the cure" in result.stdout
    assert f"1 ok, 1 to look at, {code} that stop a run" in result.stdout


def test_every_package_here_is_in_range() -> None:
    found = {check.name: check for check in package_checks()}
    assert list(found)[:8] == ["Python", *accelerators.SHOWN, "vllm"]
    assert {name: check.status for name, check in found.items()} == dict.fromkeys(found, "ok")


def test_a_package_out_of_range_warns_and_a_missing_one_fails() -> None:
    old = requirement_check(Requirement("pydantic<2,>=1"))
    assert old.status == "warn" and "tested with <2,>=1" in old.found
    assert old.cure == "pip install 'pydantic<2,>=1'"
    missing = requirement_check(Requirement("no-such-package>=3"))
    assert (missing.status, missing.found) == ("fail", "missing, needs >=3")


def test_python_has_a_range() -> None:
    assert python_check(">=3.11", "3.11.7").status == "ok"
    assert python_check(">=3.11", "3.10.1").status == "fail"


def test_exactly_one_vllm_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    absent, one, two = Requirement("no-such-vllm==1"), Requirement("pydantic>=2"), Requirement("rich>=15")
    assert engine_check([absent]).status == "fail"
    assert engine_check([absent, one]).found.startswith("pydantic 2.")
    assert "overwrite each other's files" in engine_check([one, two]).found


def test_extras_are_told_apart() -> None:
    lines = ["a>=1", "b>=1; extra == 'gpu'", "c>=1; extra == 'cpu'"]
    assert [one.name for one in of_extra([Requirement(line) for line in lines], "gpu")] == ["b"]


@pytest.mark.parametrize(
    ("cores", "allowed", "cpu_max", "status", "found"),
    [
        (8, 8, "", "ok", "8"),
        (8, 8, "max 100000", "ok", "8"),
        (64, 64, "400000 100000", "warn", "4 usable of 64"),
        (64, 4, "max 100000", "warn", "4 usable of 64"),
        (8, 8, "150000 100000", "warn", "1.5 usable of 8"),
    ],
)
def test_cores_are_those_the_container_may_use(
    cores: int, allowed: int, cpu_max: str, status: Status, found: str
) -> None:
    check = machine.cores_check(cores, allowed, cpu_max)
    assert (check.status, check.found) == (status, found)


def test_memory_is_what_the_container_may_use() -> None:
    assert machine.memory_check(64 * GIB, "max").found == "64 GiB"
    assert machine.memory_check(64 * GIB, str(4 * GIB)).status == "warn"
    assert machine.memory_check(4 * GIB, str(64 * GIB)).found.startswith("4.0 GiB")


def test_bf16_is_read_from_whole_flags() -> None:
    assert machine.bf16_check("flags : avx2 avx512_bf16 amx_bf16").found == "avx512_bf16, amx_bf16"
    assert machine.bf16_check("flags : avx2 avx512_bf16x").status == "warn"


def test_dockers_64_megabytes_of_shared_memory_warn_with_the_cure() -> None:
    check = machine.shared_memory_check(64 << 20)
    assert check.status == "warn" and "67 MB free" in check.found and "--shm-size" in check.cure
    assert machine.shared_memory_check(8 * GIB).status == "ok"


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.compiler_check().status == "ok"
    monkeypatch.setenv("CXX", "no-such-compiler")
    check = machine.compiler_check()
    assert check.status == "warn" and "missing: no-such-compiler;" in check.found


def test_disk_room_is_that_of_the_nearest_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not" / "yet"
    assert machine.disk_check("disk", folder, "cure").found.startswith(f"{folder}: ")
    assert machine.disk_check("disk", folder, "cure", fullest=0.0).status == "warn"
    monkeypatch.setattr(machine, "LEAST_DISK", 1 << 60)
    assert "GiB free, less than" in machine.disk_check("disk", folder, "cure").found
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert machine.disk_check("disk", folder, "cure").status == "fail"


def test_a_torch_that_cannot_be_imported_fails_with_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = probe()
    assert isinstance(found, Check)
    assert (found.status, found.found) == ("fail", "ImportError: libcudart.so.13: cannot open shared object file")


def test_a_torch_that_kills_its_process_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = probe()
    assert isinstance(found, Check) and found.found == "died of signal 4"


def probed(gpus: tuple[str, ...] = (), cuda: str | None = None) -> Probe:
    return Probe(
        gpus=gpus, cuda=cuda, cache=Path("/cache"), models={"embedded:x": ("", "not installed; pip install x")}
    )


def test_gpus_are_compared_with_the_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check(probed()).found == "none: generators and trainers run on the CPU"
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.82.07\necho 580.82.07\n")
    smi.chmod(0o755)
    assert "torch is a CPU build" in gpu_check(probed()).found
    blind = gpu_check(probed(cuda="13.0"))
    assert blind.status == "fail" and "driver 580.82.07" in blind.found
    monkeypatch.setattr(accelerators, "_installed", lambda name: False)
    seen = gpu_check(probed(("H200", "H200"), "13.0"))
    assert (seen.status, seen.found) == ("ok", "2 x H200, CUDA 13.0, driver 580.82.07")
    monkeypatch.setattr(accelerators, "_installed", lambda name: True)
    assert "vLLM is the CPU build" in gpu_check(probed(("H200",), "13.0")).found


def test_an_embedded_model_without_its_wheel_warns() -> None:
    (check,) = model_checks(probed())
    assert (check.name, check.status, check.found) == ("embedded:x", "warn", "not installed; pip install x")


@pytest.mark.parametrize(
    ("address", "environment", "status"),
    [
        ("", {}, "ok"),
        ("", {"RAY_AUTH_MODE": "disabled"}, "warn"),
        ("10.0.0.5:6379", {}, "warn"),
        ("10.0.0.5:6379", {"RAY_AUTH_TOKEN": "hunter2"}, "warn"),
        ("10.0.0.5:6379", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "hunter2"}, "ok"),
        ("10.0.0.5:6379", {"RAY_AUTH_MODE": "token"}, "fail"),
        ("10.0.0.5:6379", {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "hunter2"}, "warn"),
        ("head.example:6379", {}, "warn"),
        ("127.0.0.1:6379", {}, "ok"),
        ("ray://localhost:10001", {}, "ok"),
        ("[::1]:6379", {}, "ok"),
        ("auto", {}, "warn"),
        ("auto", {"RAY_AUTH_TOKEN_PATH": "/token"}, "ok"),
    ],
)
def test_a_cluster_open_to_the_network_warns_and_no_token_is_shown(
    tmp_path: Path, address: str, environment: dict[str, str], status: Status
) -> None:
    check = token_check(address, environment, tmp_path)
    assert check.status == status
    assert "hunter2" not in check.found + check.cure


def test_rays_own_token_file_is_found(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("hunter2")
    assert token_check("", {}, tmp_path).found == "token authentication, token from ~/.ray/auth_token"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no connection"),
        ("ray://127.0.0.1:1", "no connection"),
        ("somewhere", "not of the form host:port"),
        ("127.0.0.1:port", "not an address"),
        ("http://127.0.0.1:8265", "no address a driver can connect to"),
    ],
)
def test_a_cluster_that_cannot_be_reached_fails_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, message: str
) -> None:
    check = ray_checks({"RAY_ADDRESS": address}, tmp_path)[0]
    assert check.status == "fail" and message in check.found
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(PlacementError, match=message):
        require_named_cluster()


def test_a_job_does_not_ask_the_cluster_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv(JOB, "{}")
    require_named_cluster()


@contextmanager
def server(status: int, body: bytes) -> Iterator[str]:
    """An HTTP server on loopback that gives one answer to everything."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Answer) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_a_tracking_server_is_asked_for_its_health() -> None:
    with server(200, b"OK") as uri:
        assert mlflow_check(uri).status == mlflow_check(f"{uri}/").status == "ok"
    assert "does not answer" in mlflow_check(uri).found
    with server(200, b"<html>") as uri:
        assert "not like MLflow" in mlflow_check(uri).found
    with server(401, b"") as uri:
        assert "MLFLOW_TRACKING_USERNAME" in mlflow_check(uri).cure


def test_a_tracking_database_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "with space" / "mlflow.db"
    assert mlflow_check(f"sqlite:///{path}").status == "ok"
    path.parent.mkdir()
    path.write_text("no database")
    assert "is no MLflow database" in mlflow_check(f"sqlite:///{path}").found
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
    assert mlflow_check(f"sqlite:///{path}").found == f"{path}: an MLflow database"


def test_credentials_in_an_address_are_refused_and_not_shown() -> None:
    for uri in ("https://me:hunter2@tracking.example", "postgresql://me:hunter2@db/mlflow"):
        check = mlflow_check(uri)
        assert check.status == "fail"
        assert "hunter2" not in check.found + check.cure
    assert mlflow_check("databricks").status == "warn"


def test_no_check_writes_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    machine.disk_checks(tmp_path / "cache")
    ray_checks({}, tmp_path)
    mlflow_check("sqlite:///runs/mlflow.db")
    assert os.listdir(tmp_path) == []
