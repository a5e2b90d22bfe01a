"""A recipe as a Ray job: checked here, then run on the cluster from a snapshot of the working directory."""

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.runtime_env import RuntimeEnv
from rich.console import Console
from rich.text import Text

from raylign.boundary.http import ask
from raylign.boundary.secrets import holds_secret, names_secret, secrets_in, without_secrets
from raylign.config import RunConfig, load_recipe
from raylign.errors import ConfigError, PlacementError, ServerError
from raylign.reading.files import read_text
from raylign.reading.yaml_text import LONGEST_YAML, parse_yaml
from raylign.report.text import escape_control, one_line
from recipes.commands.checks.ray_cluster import TOKEN_CURE, token_source
from recipes.commands.signals import INTERRUPTED

ADDRESS_NAMES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where Ray's own job commands find the cluster, in this order."""
RUNTIME_ENV = Path("deploy/ray_runtime_env.yaml")
PLAIN_RUNTIME_ENV: Mapping[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
"""For a folder without `RUNTIME_ENV`; raylign comes from the nodes' environment then."""
_CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env")
"""Loggers of Ray's that tell of every upload."""
REACH_S = 5.0
POLL_S = 0.5
_SHOWN = 300
Answer = TypeVar("Answer")
_IN_FILES = (
    "leave it out, and give the cluster's nodes a .netrc or pip.conf with it, or set it in their environment before "
    "`ray start`"
)
_ON_NODES = "set it in the environment of the cluster's nodes before `ray start`, where the dashboard does not show it"


@dataclass(frozen=True, slots=True)
class Job:
    """What is sent to the cluster; the dashboard shows all of it."""

    entrypoint: str
    working_dir: Path
    runtime_env: Mapping[str, Any]


def submit(job: Job, address: str, *, wait: bool, console: Console) -> int:
    """Start `job`, say how to follow and stop it, and unless `wait` is off show its output until its end.

    The job's exit status; 0 as soon as it is submitted with `wait` off; 130 after Ctrl-C, which the job survives.
    Raises PlacementError when the cluster cannot be reached or refuses.
    """

    def say(line: str, end: str = "\n") -> None:
        console.print(Text(escape_control(line, keep="\n\t")), soft_wrap=True, end=end)

    client = connect(address)
    name = start(client, address, job)
    say(f"submitted to {address}: job {name}")
    say(f"follow it: {_how_to('logs --follow', address, name)}")
    say(f"stop it:   {_how_to('stop', address, name)}")
    if not wait:
        return 0
    try:
        status = follow(client, address, name, lambda lines: say(lines, end=""))
    except KeyboardInterrupt:
        say(f"job {name} goes on")
        return INTERRUPTED
    say(f"job {name} ended with status {status}{'; the same command goes on with it' if status else ''}")
    return status


def prepare(recipe: Path, settings: Sequence[str], working_dir: Path) -> Job:
    """The job that runs `recipe` with `settings`, after all checks that need no cluster.

    Raises ConfigError for whatever the run would refuse at once, for secrets, and for paths the job would not have.
    """
    _refuse_secrets(settings)
    config = load_recipe(recipe, settings)
    _require_lasting(config)
    root = working_dir.resolve()
    if not recipe.resolve().is_relative_to(root):
        raise ConfigError(
            f"{recipe} is not in {root}, the folder that is uploaded; copy it there, or name another --working-dir"
        )
    words = ["python", "-m", "recipes.commands.cli", "run", str(recipe.resolve().relative_to(root)), *settings]
    return Job(shlex.join(words), root, _runtime_env(root))


def _refuse_secrets(settings: Sequence[str]) -> None:
    for setting in settings:
        name, _, value = setting.partition("=")
        if names_secret(name) or any(secrets_in(_as_yaml(value))):
            raise ConfigError(
                f"{without_secrets(name)} looks like a secret, and the job's command is shown to everybody; {_ON_NODES}"
            )
        if holds_secret(value):
            raise ConfigError(
                f"{without_secrets(name)} has credentials in its value, and the job's command is shown to everybody; "
                f"leave them out of addresses (MLflow: MLFLOW_TRACKING_USERNAME and _PASSWORD), and {_ON_NODES}"
            )


def _as_yaml(value: str) -> object:
    """Mappings and lists in an override; None where there are none."""
    try:
        found = parse_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError):  # the recipe's own reader says what is wrong with it
        return None
    return found if isinstance(found, dict | list) else None


def _require_lasting(config: RunConfig) -> None:
    if not config.run.dir.is_absolute():
        raise ConfigError(
            f"run.dir={config.run.dir} is relative, and the job's own folder is a temporary copy; "
            "give an absolute one on storage that all nodes share (run.dir=/shared/runs)"
        )


def _runtime_env(root: Path) -> Mapping[str, Any]:
    path = root / RUNTIME_ENV
    if not path.is_file():
        return PLAIN_RUNTIME_ENV
    try:
        found = parse_yaml(read_text(path, LONGEST_YAML))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("env_vars", {}), dict):
        raise ConfigError(f"{path}: a runtime environment is a mapping, and so is env_vars in it; correct the file")
    _refuse_secrets_in(found, path)
    try:
        # With what the files that it names have in them: Ray sends that too.
        _refuse_secrets_in(RuntimeEnv(**found).to_dict(), path)
    except (ValueError, TypeError, OSError, RuntimeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path}: Ray cannot read it ({one_line(without_secrets(str(error)), _SHOWN)}); correct the file"
        ) from error
    return found


def _refuse_secrets_in(environment: Mapping[str, Any], path: Path) -> None:
    for place in secrets_in(environment):
        cure = _ON_NODES if place.startswith("env_vars.") else _IN_FILES
        raise ConfigError(f"{path}: {place} looks like a secret, and the dashboard shows it; {cure}")


def cluster_address(option: str | None, environment: Mapping[str, str]) -> str:
    """The cluster's job server: `option`, else what Ray's variables name. Raises ConfigError without an http(s) one."""
    named = {"--address": option} if option else {name: environment.get(name, "") for name in ADDRESS_NAMES}
    where, address = next(((name, text) for name, text in named.items() if text), ("", ""))
    if not address:
        raise ConfigError(f"no cluster is named; give --address http://HEAD:8265 or set {ADDRESS_NAMES[0]}")
    parts = urlsplit(address)
    if "@" in parts.netloc:
        raise ConfigError(f"{where} has credentials in it; leave them out, and {TOKEN_CURE}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{where}={address} is no job server; give the dashboard's address: http://HEAD:8265")
    return address.rstrip("/")


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server, with Ray's token where RAY_AUTH_MODE=token. Raises PlacementError within seconds."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" and not token_source(os.environ, Path.home()):
        raise PlacementError(f"RAY_AUTH_MODE=token, but there is no token; {TOKEN_CURE}")
    try:
        ask("GET", f"{address}/api/version", REACH_S)
    except ServerError as error:
        raise PlacementError(
            f"{address} does not answer within {REACH_S:g} s ({error}); correct the address, start the "
            "cluster, or open the tunnel to it (ssh -L 8265:127.0.0.1:8265 HEAD)"
        ) from error
    # Ray would let its variables win over the address that is given.
    os.environ[ADDRESS_NAMES[0]] = address
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    return _asked(address, lambda: JobSubmissionClient(address))


def start(client: JobSubmissionClient, address: str, job: Job) -> str:
    """Upload the snapshot and submit; returns the job's id. Raises PlacementError when the cluster refuses it."""
    environment = {**job.runtime_env, "working_dir": str(job.working_dir)}
    return _asked(address, lambda: client.submit_job(entrypoint=job.entrypoint, runtime_env=environment))


def _asked(address: str, ask: Callable[[], Answer]) -> Answer:
    """What the job server answers; Ray's errors become one of ours."""
    try:
        return ask()
    except AuthenticationError as error:
        given = "another" if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" else "none"
        raise PlacementError(f"{address} asks for a token and got {given}; {TOKEN_CURE}") from error
    except (RuntimeError, ValueError, OSError) as error:
        raise PlacementError(f"{address} did not take the job: {error}") from error


def follow(client: JobSubmissionClient, address: str, job: str, show: Callable[[str], None]) -> int:
    """Show the job's output until it ends; its exit status. Raises PlacementError when the connection is lost."""
    try:
        asyncio.run(_tail(client, job, show))
        while not (found := client.get_job_info(job)).status.is_terminal():
            time.sleep(POLL_S)
    except (aiohttp.ClientError, RuntimeError, OSError) as error:
        raise PlacementError(
            f"{address}: job {job} cannot be followed any more ({error}); it goes on without that, look again: "
            f"{_how_to('logs --follow', address, job)}"
        ) from error
    if found.status == JobStatus.SUCCEEDED:
        return 0
    return found.driver_exit_code or 1


async def _tail(client: JobSubmissionClient, job: str, show: Callable[[str], None]) -> None:
    async for lines in client.tail_job_logs(job):
        show(lines)


def _how_to(verb: str, address: str, job: str) -> str:
    """A shell line of Ray's for a job."""
    command, *options = verb.split()
    return shlex.join(["ray", "job", command, *options, "--address", address, job])
