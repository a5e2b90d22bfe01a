"""Stores of process groups that listen on the address they name, and on no other."""

import importlib
import socket
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store, TCPStore

# torch.distributed has a function of the same name as this module of its.
rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
_unbound_store = rendezvous._create_c10d_store
_BACKLOG = 1024


def listen_on_own_address() -> None:
    """Let the process groups that this process opens (`env://`, `tcp://`) meet on their own address.

    torch's store listens on every interface, unauthenticated, and takes no address to bind to; it does take a socket
    that listens already. Call it before a group is opened; calling it again changes nothing.
    """
    rendezvous._create_c10d_store = _bound_store


def _bound_store(
    hostname: str, port: int, rank: int, world_size: int, timeout: timedelta, use_libuv: bool = True
) -> Store:
    listener = _listener(hostname, port) if rank == 0 else None
    if listener is None:
        found: Store = _unbound_store(hostname, port, rank, world_size, timeout, use_libuv)
        return found
    return TCPStore(
        host_name=hostname,
        port=listener.getsockname()[1],
        world_size=world_size,
        is_master=True,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
        use_libuv=use_libuv,
    )


def _listener(hostname: str, port: int) -> socket.socket | None:
    """None where the port is taken: by a store of this process, which torch then shares, or by another process."""
    listener = socket.socket(socket.AF_INET6 if ":" in hostname else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((hostname, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        return None
    return listener
