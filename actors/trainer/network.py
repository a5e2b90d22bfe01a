"""Addresses for process groups."""

import socket

import ray


def free_address() -> tuple[str, int]:
    """This node's address and a port nobody listens on; another process may still take it first."""
    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]
