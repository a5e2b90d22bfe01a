"""Where a generator's engine runs: on which cores, with sockets of its own, and on CPUs in a process started ahead."""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from actors.generator.actor import EngineSpec
from actors.supervision.janitor import clean_up_family
from raylign.boundary.imports import lean_imports
from raylign.roles import Generator

_PRELOADED = "actors.generator.preloaded"


def start_engine(spec: EngineSpec, name: str) -> Generator:
    """A generator whose engine is ready.

    A process for an engine on CPUs imports vLLM while this one does. On GPUs vLLM sets more of the environment between
    its import and the engine's start, so that the engine's process begins then.
    """
    sockets = _own_sockets()
    if spec.device == "cpu":
        _use_cores(spec)
    if spec.one_process:
        multiprocessing.set_forkserver_preload([_PRELOADED])
        forkserver.ensure_running()
    clean_up_family(os.getpid(), sockets)
    with lean_imports():
        from actors.generator.engine import VllmEngine  # noqa: PLC0415 - takes 12 seconds, after what is above
    return VllmEngine(spec, name)


@contextmanager
def forked_from_preloaded() -> Iterator[None]:
    """Engines that vLLM starts inside are forks of the process that `start_engine` has started."""
    utils: Any = import_module("vllm.v1.engine.utils")
    context, vllms_own = multiprocessing.get_context("forkserver"), utils.get_mp_context
    utils.get_mp_context = lambda: context
    try:
        yield
    finally:
        utils.get_mp_context = vllms_own


def _use_cores(spec: EngineSpec) -> None:
    """Let a CPU engine compute in its own process, or in a worker a part of the model, on its share of the cores.

    A single worker process would leave one core to an engine that spins while it waits; vLLM takes "uni" on CPUs from
    those only who set its threads themselves. Several workers would each get a memory node of their own, and be refused
    where there are fewer.
    """
    threads = max(1, spec.threads // spec.tensor_parallel_size)
    placed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if spec.one_process else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {**placed, "OMP_NUM_THREADS": str(threads)}


def _own_sockets() -> Path:
    """A folder for vLLM's sockets, which it leaves behind when its processes are killed."""
    folder = Path(tempfile.mkdtemp(prefix="raylign-"))
    os.environ["VLLM_RPC_BASE_PATH"] = str(folder)
    return folder
