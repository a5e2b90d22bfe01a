"""Real MLflow servers on loopback and databases, for tests and benchmarks, and a proxy that makes a server slow."""

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from raylign.tracking.mlflow_store import create_database

START_S = 1200.0


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
    """The URI of a server on `port` whose record is in `folder`. At the end it is killed, not asked to stop."""
    database = folder / "server.db"
    uri = f"sqlite:///{database}" if database.exists() else put_database(database)
    store = ["--backend-store-uri", uri, "--artifacts-destination", str(folder / "files")]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port), *store]
    with _process(command, folder / "server.log", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}):
        uri = f"http://127.0.0.1:{port}"
        wait_until(lambda: _answers(f"{uri}/health"))
        yield uri


@contextmanager
def slow_proxy(server: str, delay_s: float, folder: Path) -> Iterator[str]:
    """The URI of a proxy to `server` that holds every answer back for `delay_s` at least."""
    port = free_port()
    command = [sys.executable, "-m", "tests.slow_proxy", str(port), server.rpartition(":")[2], str(delay_s)]
    with _process(command, folder / "proxy.log", {}):
        wait_until(lambda: _listens(port))
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _process(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            stdout=output,
            stderr=output,
            env=os.environ | environment,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(address: str) -> bool:
    try:
        return requests.get(address, timeout=30).ok
    except requests.RequestException:
        return False


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
