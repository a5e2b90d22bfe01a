"""The services that a run talks to: a Ray cluster, and the store of MLflow."""

import ipaddress
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from raylign.boundary.http import OK, ask
from raylign.errors import PlacementError, ServerError
from recipes.commands.checks.machine import Check

CONNECT_TIMEOUT_S = 3.0
STATUS_TIMEOUT_S = 20.0
DEFAULT_TOKEN = Path(".ray/auth_token")
"""Ray's own token file, under the home folder."""
TOKEN_CURE = "set RAY_AUTH_MODE=token and give the cluster's token in RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What a Ray job's driver has in its environment, beside the address of the cluster that started it."""
FOUND_BY_RAY = ("", "local", "auto")
"""Addresses for which `ray.init` turns token authentication on by itself; for an explicit one it never does."""

NAME = "MLflow"
TIMEOUT_S = 3.0
SQLITE = "sqlite:///"
_CURES = dict.fromkeys((401, 403), "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
_MOVED = "look there; where it redirects, give the address that it names"


def ray_checks(environment: Mapping[str, str], home: Path) -> list[Check]:
    """Reachability of the cluster, then its token."""
    address = environment.get("RAY_ADDRESS", "")
    return [_cluster_check(address), token_check(address, environment, home)]


def require_named_cluster() -> None:
    """Raises PlacementError in seconds when RAY_ADDRESS names no live cluster; `ray.init` would wait for minutes.

    A job's own cluster has just started this process: it is not asked.
    """
    if JOB in os.environ:
        return
    check = _cluster_check(os.environ.get("RAY_ADDRESS", ""))
    if check.status == "fail":
        raise PlacementError(f"{check.found}; {check.cure}")


def _cluster_check(address: str) -> Check:
    name = "Ray cluster"
    if not address or address == "local":
        return Check(name, "ok", "RAY_ADDRESS is not set: each run starts its own on this machine")
    where = f"RAY_ADDRESS={address}"
    if address.startswith(("http://", "https://")):
        cure = "that is the jobs API; submit the run there with `ray job submit`, or give host:6379"
        return Check(name, "fail", f"{where} is no address a driver can connect to", cure)
    fault = _fault(address)
    if "AuthenticationError" in fault:
        return Check(name, "fail", f"{where} asks for a token and got none, or another", TOKEN_CURE)
    if fault:
        cure = "start the cluster, correct RAY_ADDRESS, or unset it to use this machine"
        return Check(name, "fail", f"{where}: {fault}", cure)
    return Check(name, "ok", f"{where} answers")


def _fault(address: str) -> str:
    """Why the cluster at `address` cannot be used; empty when it answers."""
    if address == "auto":
        return _status_fault(address)
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        return f"not an address ({error})"
    if host is None or port is None:
        return "not of the form host:port"
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return f"no connection ({error})"
    return "" if address.startswith("ray://") else _status_fault(address)


def _status_fault(address: str) -> str:
    """What `ray status` says against it: no such cluster, no valid token, no Ray at all."""
    command = [str(Path(sys.executable).with_name("ray")), "status", "--address", address]
    try:
        done = subprocess.run(
            command,
            env=_as_init_sees_it(os.environ, address),
            capture_output=True,
            text=True,
            timeout=STATUS_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"`ray status` had no answer within {STATUS_TIMEOUT_S:g} s"
    except FileNotFoundError:
        return "the command `ray` is not installed beside this Python"
    return "" if done.returncode == 0 else last_line(done.stderr)


def last_line(text: str) -> str:
    """The last line that is not blank; of a traceback, the error itself."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it gave no reason"


def _as_init_sees_it(environment: Mapping[str, str], address: str) -> dict[str, str]:
    """Ray's commands use a token only when told, `ray.init` also when it finds the cluster by itself."""
    if address not in FOUND_BY_RAY or "RAY_AUTH_MODE" in environment or not token_source(environment, Path.home()):
        return dict(environment)
    return {**environment, "RAY_AUTH_MODE": "token"}


def token_source(environment: Mapping[str, str], home: Path) -> str:
    """Where Ray finds a token (never the token); empty when there is none."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if environment.get(name):
            return name
    return f"~/{DEFAULT_TOKEN}" if (home / DEFAULT_TOKEN).is_file() else ""


def token_check(address: str, environment: Mapping[str, str], home: Path) -> Check:
    """Without a token, whoever reaches the cluster's ports can run code on it."""
    name = "Ray token"
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    source = token_source(environment, home)
    if mode == "disabled":
        cure = "unset RAY_AUTH_MODE, or set it to token"
        return Check(name, "warn", "RAY_AUTH_MODE=disabled: whoever reaches Ray's ports can run code", cure)
    if mode == "token" or address in FOUND_BY_RAY:
        if source:
            return Check(name, "ok", f"token authentication, token from {source}")
        if address in ("", "local"):
            return Check(name, "ok", f"token authentication; Ray makes ~/{DEFAULT_TOKEN} at first use")
        return Check(name, "fail" if mode else "warn", "there is no token", TOKEN_CURE)
    if _is_loopback(address):
        return Check(name, "ok", "RAY_AUTH_MODE is not set, so none is used; the address is loopback")
    return Check(
        name, "warn", "RAY_AUTH_MODE is not set, so none is used: a cluster that answers admits anyone", TOKEN_CURE
    )


def _is_loopback(address: str) -> bool:
    try:
        host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def mlflow_check(uri: str) -> Check:
    """A sqlite file is opened, a server is asked for its health; other stores are left alone."""
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        cure = "use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; a run refuses such an address"
        return Check(NAME, "fail", f"credentials in the {parts.scheme} address would be saved with each run", cure)
    if uri.startswith(SQLITE):
        return sqlite_check(Path(unquote(uri.removeprefix(SQLITE))).absolute())
    if uri.startswith(("http://", "https://")):
        return server_check(uri)
    cure = "give http(s)://..., sqlite:///... or leave it out"
    return Check(NAME, "warn", f"{uri} was not probed: neither a server nor a sqlite file", cure)


def sqlite_check(path: Path) -> Check:
    if not path.exists():
        parent = next(folder for folder in path.parents if folder.is_dir())
        if os.access(parent, os.W_OK):
            return Check(NAME, "ok", f"{path}: made by the first run")
        return Check(NAME, "fail", f"{parent} is not writable", "set tracking.uri to a place that is")
    try:
        with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=TIMEOUT_S) as database:
            database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        return Check(NAME, "fail", f"{path} is no MLflow database ({error})", "move it away, or name another file")
    return Check(NAME, "ok", f"{path}: an MLflow database")


def server_check(uri: str) -> Check:
    """The run itself survives an outage: its journal is fed to the server later. So an outage only warns."""
    try:
        answer = ask("GET", f"{uri.rstrip('/')}/health", TIMEOUT_S)
    except ServerError as error:
        cure = "start it: mlflow server --host 127.0.0.1 --backend-store-uri sqlite:///mlflow.db"
        return Check(NAME, "warn", f"{uri} does not answer within {TIMEOUT_S:g} s ({error})", cure)
    if answer.status != OK:
        return Check(NAME, "warn", f"{uri} answers with HTTP status {answer.status}", _CURES.get(answer.status, _MOVED))
    if answer.body.strip() != b"OK":
        return Check(NAME, "warn", f"{uri} answers, but not like MLflow", "correct the address")
    return Check(NAME, "ok", f"{uri} is healthy")
