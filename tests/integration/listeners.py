"""Who listens on which TCP address, as the kernel says."""

import contextlib
import os
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist

from actors.bound_store import listen_on_own_address


def descendants(root: psutil.Process | None = None) -> dict[psutil.Process, str]:
    """``root`` (this process), all that it started and what those started, each with its command line.

    One that has ended is left out, a zombie too: it has no command line any more.
    """
    root = root or psutil.Process()
    found = {}
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process] = " ".join(process.cmdline())
    return found


def listening() -> dict[tuple[str, int], str]:
    """(address, port) of every listening TCP socket of this process and its descendants, and the process's name."""
    found: dict[tuple[str, int], str] = {}
    for process, line in descendants().items():
        try:
            sockets = process.net_connections(kind="tcp")
        except psutil.NoSuchProcess:
            continue
        found |= {tuple(each.laddr): line[:120] for each in sockets if each.status == psutil.CONN_LISTEN}
    return found


class _Member:
    """One rank of a process group."""

    def __init__(self, rank: int, address: str, port: int) -> None:
        listen_on_own_address()
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        dist.init_process_group("gloo")

    def sum(self) -> float:
        value = torch.tensor([dist.get_rank() + 1.0])
        dist.all_reduce(value)
        return float(value)


Member: Any = ray.remote(_Member)
