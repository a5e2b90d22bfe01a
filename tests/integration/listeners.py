"""Who listens on which TCP address, as the kernel says."""

import contextlib
import ipaddress
import os
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist

from actors.trainer.bound_store import listen_on_own_address
from tests.processes import descendants

Listeners = dict[tuple[str, int], str]


def listening(root: psutil.Process | None = None) -> Listeners:
    """(address, port) of every listening TCP socket of `root` (this process) and its descendants, and whose it is."""
    found: Listeners = {}
    for process, line in descendants(root).items():
        with contextlib.suppress(psutil.NoSuchProcess):
            sockets = process.net_connections(kind="tcp")
            found |= {tuple(each.laddr): line[:120] for each in sockets if each.status == psutil.CONN_LISTEN}
    return found


def outside(found: Listeners) -> Listeners:
    """Those that other machines can reach."""
    return {place: name for place, name in found.items() if not _is_loopback(place[0])}


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


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
