"""Real MLflow servers on loopback and databases, for tests and benchmarks, and a proxy that makes a server slow."""

import functools
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import requests
import uvicorn

from raylign.tracking.mlflow_store import create_database

START_S = 1200.0
_FORKS = multiprocessing.get_context("forkserver")
"""A process has one such server: no engine may be started in one that starts MLflow's, where vLLM trips over Flask."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(ready: Callable[[], bool], timeout_s: float = START_S) -> None:
    """Raises TimeoutError when `ready` is not true within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready within {timeout_s:g} s")
        time.sleep(0.1)


@functools.cache
def _new_database() -> tempfile.TemporaryDirectory[str]:
    """A folder with a database as MLflow makes it, until this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="raylign-mlflow-")
    create_database(f"sqlite:///{folder.name}/mlflow.db")
    return folder


def put_database(path: Path) -> str:
    """A new database at `path`, and its URI. MLflow takes seconds to make one, by all the steps of its history."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(_new_database().name) / "mlflow.db", path)
    return f"sqlite:///{path}"


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """The URI of a server on `port` whose record is in `folder`. At the end it is killed, not asked to stop.

    What `mlflow server` starts, forked from a process that has loaded MLflow for all servers of this one.
    """
    database = folder / "server.db"
    uri = f"sqlite:///{database}" if database.exists() else put_database(database)
    _FORKS.set_forkserver_preload(["uvicorn", "mlflow.server.fastapi_app"])
    process = _FORKS.Process(target=_serve, args=(uri, folder, port, dict(os.environ)), daemon=True)
    process.start()
    try:
        uri = f"http://127.0.0.1:{port}"
        wait_until(lambda: _answers(f"{uri}/health") or not process.is_alive())
        assert process.is_alive(), (folder / "server.log").read_text()
        yield uri
    finally:
        process.kill()
        process.join()


def _serve(database: str, folder: Path, port: int, environment: Mapping[str, str]) -> None:
    # Takes seconds, which only this process needs.
    from mlflow.server import _UVICORN_LOG_CONFIG, constants  # noqa: PLC0415
    from mlflow.server.fastapi_app import app  # noqa: PLC0415

    os.environ.update(environment)
    os.environ |= {
        constants.BACKEND_STORE_URI_ENV_VAR: database,
        constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
        constants.ARTIFACTS_DESTINATION_ENV_VAR: str(folder / "files"),
    }
    log = os.open(folder / "server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    uvicorn.run(app, host="127.0.0.1", port=port, log_config=str(_UVICORN_LOG_CONFIG))


@contextmanager
def slow_proxy(server: str, delay_s: float, folder: Path) -> Iterator[str]:
    """The URI of a proxy to `server` that holds every answer back for `delay_s` at least."""
    port = free_port()
    command = [sys.executable, "-m", "tests.slow_proxy", str(port), server.rpartition(":")[2], str(delay_s)]
    with (folder / "proxy.log").open("a") as output:
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=output, stderr=output)
    try:
        wait_until(lambda: _listens(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _answers(address: str) -> bool:
    try:
        return requests.get(address, timeout=30).ok
    except requests.RequestException:
        return False


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
