"""The Ray cluster a run lives on: an existing one when RAY_ADDRESS names it, else a private one on this machine."""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def actor_environment() -> dict[str, str]:
    """Variables every actor starts with; what the user has set wins. `ninja` must be found beside the interpreter."""
    tools = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    prefixed = path if tools in path.split(os.pathsep) else f"{tools}{os.pathsep}{path}"
    return {**{name: os.environ.get(name, value) for name, value in _QUIET.items()}, "PATH": prefixed}


@contextmanager
def cluster(num_cpus: int | None = None) -> Iterator[Mapping[str, float]]:
    """Connect or start, yield the cluster's total resources, and leave it clean.

    `num_cpus` sizes a private cluster; by default it has the machine's cores.
    """
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Inside a Ray job: variables that the job sets too are no conflict, `actor_environment` has the job's values.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    terminate = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS")
    runtime_env = {"env_vars": actor_environment()}
    if address:
        ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.WARNING)
    else:
        ray.init(
            address="local",
            num_cpus=num_cpus or os.cpu_count(),
            include_dashboard=False,
            runtime_env=runtime_env,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    # Ray's own handler aborts the process three seconds after SIGTERM, in the middle of the clean-up.
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def log_folder() -> Path:
    """Where Ray keeps the actors' output on this node."""
    here = ray.get_runtime_context().get_node_id()
    socket = next(node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == here)
    return Path(socket).parents[1] / "logs"
