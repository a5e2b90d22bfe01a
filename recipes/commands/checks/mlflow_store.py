"""Can MLflow's record be written where the recipe says?"""

import os
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

from raylign.boundary.http import OK, ask
from raylign.errors import ServerError
from recipes.commands.checks.base import Check

NAME = "MLflow"
TIMEOUT_S = 3.0
SQLITE = "sqlite:///"
_CURES = dict.fromkeys((401, 403), "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
_MOVED = "look there; where it redirects, give the address that it names"


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
