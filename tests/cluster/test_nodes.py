"""The nodes themselves: apart from each other and from this machine, and gone at the end."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.nodes import Node, Nodes, three_nodes
from tests.integration.tiny import ROOT, wait_until
from tests.processes import alive

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3).close()"
LISTEN = (
    "import socket, sys; s = socket.create_server((sys.argv[1], 7000)); print('listening', flush=True)\n"
    "while True: s.accept()"
)
HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom tests.cluster.nodes import three_nodes\n"
    "with three_nodes(Path(sys.argv[1])) as nodes:\n"
    "    nodes.head.run(['sleep', '1000'])\n"
    "    print('started', *[node.init for node in (nodes.outside, *nodes)], flush=True)\n"
    "    time.sleep(1000)\n"
)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with three_nodes(tmp_path_factory.mktemp("nodes")) as made:
        yield made


def reaches(here: Node, address: str, port: int = 7000) -> bool:
    return here.run([sys.executable, "-c", CONNECT, address, str(port)]).finish(60) == 0


def test_each_has_its_own_memory_and_sockets_and_all_share_one_folder(nodes: Nodes) -> None:
    for node in nodes:
        node.call(["touch", "/dev/shm/own", "/tmp/own"])
        (nodes.shared / node.name).write_text("seen by all")
        assert not Path("/dev/shm/own").exists() and not Path("/tmp/own").exists()
    for node in nodes:
        node.call(["rm", "/dev/shm/own", "/tmp/own"])
        assert node.call(["sh", "-c", "ls -A /dev/shm"]) == ""
        assert node.call(["cat", *(nodes.shared / other.name for other in nodes)]) == "seen by all" * 3
        assert node.call(["hostname"]).strip() == node.name
        found = node.call([sys.executable, "-c", "import socket; print(socket.gethostbyname(socket.gethostname()))"])
        assert found.strip() == node.address


def test_they_reach_each_other_and_nobody_else(nodes: Nodes) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN.replace("7000", "0"), "0.0.0.0"], stdout=subprocess.PIPE
    ) as here:
        try:
            for node in (*nodes, nodes.outside):
                routes = node.call(["ip", "-4", "route"]).splitlines()
                assert len(routes) == 1 and routes[0].startswith("10.77.0.0/24 "), routes
            addresses = [
                each.address
                for found in psutil.net_if_addrs().values()
                for each in found
                if each.family.name == "AF_INET" and not each.address.startswith("127.")
            ]
            (port,) = (connection.laddr.port for connection in psutil.Process(here.pid).net_connections())
            assert not any(reaches(nodes.head, address, port) for address in addresses)
        finally:
            here.kill()
    listener = nodes.head.run([sys.executable, "-c", LISTEN, nodes.head.address])
    listener.wait_for("listening", 60)
    assert all(reaches(node, nodes.head.address) for node in (*nodes.workers, nodes.outside))
    listener.stop()
    wait_until(lambda: not reaches(nodes.workers[0], nodes.head.address), 60, lambda: "the listener is still there")


def test_a_cut_node_is_silent_until_it_joins_again(nodes: Nodes) -> None:
    worker, other = nodes.workers
    listener = worker.run([sys.executable, "-c", LISTEN, worker.address])
    listener.wait_for("listening", 60)
    worker.cut()
    assert not reaches(nodes.head, worker.address) and reaches(worker, worker.address)
    assert not reaches(worker, other.address)
    worker.join()
    wait_until(lambda: reaches(nodes.head, worker.address), 60, lambda: "the node is still cut off")
    listener.stop()


def test_a_killed_node_takes_its_processes_with_it(tmp_path: Path) -> None:
    with three_nodes(tmp_path) as nodes:
        worker = nodes.workers[1]
        worker.call(["sh", "-c", "setsid sleep 1000 > /dev/null 2>&1 &"])
        inside = [pid for pid, line in worker.processes().items() if line == "sleep 1000"]
        assert len(inside) == 1
        worker.kill()
        wait_until(lambda: not alive(inside[0]), 60, lambda: "its process is alive")


def test_whoever_made_nodes_and_is_killed_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}"}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        inits = [int(word) for word in owner.stdout.readline().split()[1:]]
        assert len(inits) == 4 and all(alive(pid) for pid in inits)
        networks = {os.readlink(f"/proc/{pid}/ns/net") for pid in inits}
        owner.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(alive(pid) for pid in inits), 60, lambda: "a node is alive")

    def left() -> set[str]:
        found = set()
        for process in psutil.process_iter():
            try:
                found.add(os.readlink(f"/proc/{process.pid}/ns/net"))
            except OSError:
                continue
        return networks & found

    wait_until(lambda: not left(), 60, lambda: f"processes in {left()}")
    mounted = Path("/proc/self/mounts").read_text()
    assert str(tmp_path) not in mounted
