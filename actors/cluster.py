"""The Ray cluster a run lives on: an existing one when RAY_ADDRESS names it, else a private one on this machine."""

import contextlib
import functools
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import ray
from ray._private import parameter, ray_constants, services
from ray.exceptions import RayError

from actors.supervision.cures import cure_of
from actors.supervision.endings import one_line
from actors.supervision.janitor import clean_up_processes
from raylign.errors import PlacementError

LOOPBACK = "127.0.0.1"
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
_LOCAL = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": LOOPBACK,
    "VLLM_LOOPBACK_IP": LOOPBACK,
}
"""Process groups and engines of a cluster that is this machine alone: nobody else needs to reach them."""
_LAST_LINES = 100
_STARTS = 4
_TIMED_OUT = "timed out during startup"
_PID = re.compile(r"\bpid(?:=|: )(\d+)")


def actor_environment(*, private: bool = False) -> dict[str, str]:
    """Variables every actor starts with; what the user has set wins. `ninja` must be found beside the interpreter.

    Actors of a `private` cluster listen on loopback.
    """
    tools = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    prefixed = path if tools in path.split(os.pathsep) else f"{tools}{os.pathsep}{path}"
    defaults = {**_QUIET, **(_LOCAL if private else {})}
    return {**{name: os.environ.get(name, value) for name, value in defaults.items()}, "PATH": prefixed}


@contextmanager
def cluster(num_cpus: int | None = None) -> Iterator[Mapping[str, float]]:
    """Connect or start, yield the cluster's total resources, and leave it clean.

    `num_cpus` sizes a private cluster; by default it has the machine's cores. A private cluster listens on loopback
    alone, and asks for a token (Ray's default; RAY_AUTH_MODE says otherwise). Raises PlacementError when there is none.
    An error that ends the work on it gets the last lines of the actors that it names as notes.
    """
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    terminate = signal.getsignal(signal.SIGTERM)
    _join(num_cpus)
    # Ray's own handler aborts the process three seconds after SIGTERM, in the middle of the clean-up.
    signal.signal(signal.SIGTERM, terminate)
    logs = log_folder()
    try:
        yield ray.cluster_resources()
    except Exception as error:
        for words in last_words(error, logs):
            error.add_note(words)
        raise
    finally:
        ray.shutdown()


def _join(num_cpus: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Inside a Ray job: variables that the job sets too are no conflict, `actor_environment` has the job's values.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    address = os.environ.get("RAY_ADDRESS")
    environment = actor_environment(private=not address)
    try:
        if address:
            runtime_env = {"env_vars": environment}
            ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.WARNING)
            return
        # Ray gives its workers the lowest priority but four: beside a busy program they would come to nothing.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Workers that Ray starts ahead: one for each core, and few would be used.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        # Actors inherit the environment of Ray's processes; one that travels with the job costs each start a second.
        with (
            _variables(environment),
            _on_loopback(),
            _ended_with_this_process(),
            _in_own_groups(),
            _without_spectators(),
        ):
            _start(num_cpus or os.cpu_count())
    except (OSError, RuntimeError, ValueError, RayError) as cause:
        what = f"RAY_ADDRESS={address}: cannot join the cluster" if address else "Ray cannot start on this machine"
        error = PlacementError(f"{what} ({one_line(str(cause))})")
        known = cure_of("cluster", f"{type(cause).__name__}: {cause}" if address else str(cause))
        error.cure = known if address else f"`raylign doctor` says what this machine lacks; {known}"
        raise error from cause


def _start(num_cpus: int | None) -> None:
    """A local cluster. Ray gives a node 30 seconds, by a constant of its own: on a busy machine it is asked again.

    Raises RuntimeError after the last try.
    """
    this = psutil.Process()
    before = set(this.children(recursive=True))
    for tries_left in reversed(range(_STARTS)):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
            return
        except Exception as error:  # Ray raises this very class
            if _TIMED_OUT not in str(error):
                raise
            ray.shutdown()
            for process in set(this.children(recursive=True)) - before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if not tries_left:
                raise RuntimeError(f"{error} Tried {_STARTS} times; this machine is too busy") from error


def last_words(error: BaseException, logs: Path) -> list[str]:
    """The ends of the logs in the folder of this node, of the actors whose processes the error names."""
    text, seen = "", error
    while seen.__cause__ is not None:
        text, seen = f"{text}\n{seen}", seen.__cause__
    found = []
    for pid in dict.fromkeys(_PID.findall(f"{text}\n{seen}")):
        for path in sorted(logs.glob(f"worker-*-{pid}.*")):
            if lines := path.read_text(errors="replace").splitlines()[-_LAST_LINES:]:
                found.append("\n".join([f"The end of {path}:", *lines]))
    return found


@contextmanager
def _variables(environment: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray starts its processes on 127.0.0.1, as it does by itself on macOS and Windows.

    `_node_ip_address="127.0.0.1"` would not do: on Linux Ray puts the outer address in its place.
    """
    with (
        _replaced(ray_constants, "ENABLE_RAY_CLUSTER", False),
        _variables({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}),
    ):
        yield


@contextmanager
def _in_own_groups() -> Iterator[None]:
    """A signal to the driver's process group, which `timeout` and schedulers send, is the driver's to answer.

    Without Ray it could not close what is open.
    """
    with _replaced(services, "ConsolePopen", functools.partial(services.ConsolePopen, process_group=0)):
        yield


@contextmanager
def _without_spectators() -> Iterator[None]:
    """Ray starts no process that would only watch: no autoscaler, sender of logs to drivers, or dashboard server.

    `ray.init` has no options for them; with `include_dashboard=False` the server still starts, with nothing to serve.
    """
    left_out: dict[str, Any] = {"include_log_monitor": False, "no_monitor": True}
    with (
        _replaced(parameter, "RayParams", functools.partial(parameter.RayParams, **left_out)),
        _replaced(services, "start_api_server", lambda *_, **__: ("", None)),
    ):
        yield


@contextmanager
def _replaced(owner: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _ended_with_this_process() -> Iterator[None]:
    """Ray's agents outlive a driver that was killed: whatever is started inside ends with this process."""
    this = psutil.Process()
    before = set(this.children(recursive=True))
    yield
    started = set(this.children(recursive=True)) - before
    clean_up_processes(this.pid, [process.pid for process in started])


def log_folder() -> Path:
    """Where Ray keeps the actors' output on this node."""
    here = ray.get_runtime_context().get_node_id()
    socket = next(node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == here)
    return Path(socket).parents[1] / "logs"
