"""Three nodes of a cluster on this one machine, in namespaces, with a bridge between them and no way out.

Each node has its own network (one address on the bridge), /dev/shm, /tmp, home folder, host name and process ids. They
share one folder, as storage on a cluster is shared, and see the checkout, its environment and compiled kernels as they
are. A fourth place, `outside`, is on the bridge too and in no cluster. All of it hangs on pipes that this process
holds: whatever ends this process ends the nodes, and namespaces without processes are gone, with their interfaces and
mounts.
"""

import getpass
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.integration.tiny import ROOT, clean_environment, wait_until
from tests.processes import alive

BIN = Path(sys.executable).parent
REQUIRED = "RAYLIGN_REQUIRE_CLUSTER"
"""With the value 1, tests that need nodes fail where there can be none."""
_SUBNET = "10.77.0"
_OUTSIDE, _HEAD, _WORKERS = ("outside", 1), ("head", 10), (("worker-1", 11), ("worker-2", 12))
_BRIDGE = "nodes"
_UNSHARED = ("--net", "--mount", "--pid", "--uts", "--ipc")
_PROBE = "ip link add bridge type bridge && ip link add end type veth peer name other && mount -t tmpfs tmpfs /dev/shm"
_PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "mount")
_GIB = 1 << 30
_STORE_BYTES = 256 << 20
HEAD_PORT, DASHBOARD_PORT = 6379, 8265
_SHORT_S = 120.0
START_S = 300.0
_STARTS = 5
_ENDED_S = 60.0
WARM = {
    "TORCHINDUCTOR_CACHE_DIR": Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}",
    "VLLM_CACHE_ROOT": Path.home() / ".cache/vllm",
}
"""Kernels that are compiled once for this machine; each node's own would take a minute more."""
_RAY = {
    # A silent node is given up after half a minute at most.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_DISABLE_DASHBOARD_LOG_INFO": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",
}


def why_none() -> str:
    """Why this machine cannot have nodes; empty where it can."""
    if sys.platform != "linux":
        return f"nodes are Linux namespaces, and this is {sys.platform}"
    if os.geteuid() != 0:
        return "network and mount namespaces are made by root"
    if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(missing)} not found; Debian, Ubuntu: apt install iproute2 util-linux"
    tried = subprocess.run(
        ["unshare", *_UNSHARED, "--fork", "--mount-proc", "sh", "-c", _PROBE],
        capture_output=True,
        text=True,
        check=False,
        timeout=_SHORT_S,
    )
    return f"no namespaces, bridges or mounts here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True)
class Program:
    """A command in a node; stdout and stderr go to `log`."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def says(self, text: str, timeout_s: float) -> bool:
        """Whether the output has `text` before the program ends; one of both must be within the time."""
        wait_until(lambda: text in self.output or self.ended, timeout_s, lambda: f"{text!r} in\n{self.output}")
        return text in self.output

    def wait_for(self, text: str, timeout_s: float) -> None:
        """Wait until the output has `text`; the program must not end before."""
        assert self.says(text, timeout_s), f"ended with {self.process.returncode} before {text!r}:\n{self.output}"

    def finish(self, timeout_s: float) -> int:
        """Exit status, negative when a signal ended it."""
        wait_until(lambda: self.ended, timeout_s, lambda: f"still running\n{self.output}")
        return self.process.wait()

    def stop(self) -> None:
        """Kill it at once; its children go on."""
        self.process.kill()
        self.process.wait()


@dataclass
class Node:
    """A place with its own network, memory and processes. `folder`/tmp is what it has as /tmp; logs are beside it."""

    name: str
    address: str
    folder: Path
    _holder: subprocess.Popen[bytes]
    _bridge: "Node | None" = None
    _ray: list[Program] = field(default_factory=list)

    @property
    def init(self) -> int:
        """Process id, as seen from here, of the node's first process."""
        return int(psutil.Process(self._holder.pid).children()[0].pid)

    def run(self, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Program:
        """Start `command` in the node, in a clean environment with `env`. It ends with the node, and with us."""
        handle, log = tempfile.mkstemp(dir=self.folder, prefix=f"{Path(command[0]).name}-", suffix=".txt")
        inside = ["setpriv", "--pdeathsig", "KILL", "env", f"--chdir={cwd}", *map(str, command)]
        with os.fdopen(handle, "wb") as output:
            process = subprocess.Popen(
                [*self._enter(*_UNSHARED), *inside],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=clean_environment({**_environment(), **(env or {})}),
                start_new_session=True,
            )
        return Program(process, Path(log))

    def call(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        timeout_s: float = _SHORT_S,
    ) -> str:
        """The output of `command`, which must succeed."""
        program = self.run(command, env=env, cwd=cwd)
        status = program.finish(timeout_s)
        assert status == 0, f"{command} in {self.name} ended with {status}:\n{program.output}"
        return program.output

    def _enter(self, *namespaces: str) -> list[str]:
        return ["nsenter", f"--target={self.init}", *namespaces, "--"]

    def ip(self, *arguments: str) -> None:
        """An `ip` command in the node's network, with process ids as seen from here."""
        _checked([*self._enter("--net"), "ip", *arguments])

    def processes(self) -> dict[int, str]:
        """Command lines of the node's living processes, by their ids as seen from here."""
        here = os.readlink(f"/proc/{self.init}/ns/pid")
        found = {}
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == here and (line := " ".join(process.cmdline())):
                    found[process.pid] = line.strip()
        return found

    def start_ray(
        self,
        *,
        head: str | None = None,
        num_cpus: int,
        resources: Mapping[str, float] | None = None,
        token: Path | None = None,
    ) -> None:
        """A raylet that has joined the cluster of the node at `head`; without one, a cluster whose head this is.

        `token` is a file with the cluster's. Once more when Ray is late: it gives itself 30 seconds, by a constant.
        """
        command = [
            *(str(BIN / "ray"), "start", "--block", "--disable-usage-stats", f"--node-ip-address={self.address}"),
            *(f"--num-cpus={num_cpus}", f"--resources={json.dumps(dict(resources or {}))}"),
            f"--object-store-memory={_STORE_BYTES}",
        ]
        if head is None:
            command += ["--head", f"--port={HEAD_PORT}", "--include-dashboard=true", f"--dashboard-host={self.address}"]
        else:
            command += [f"--address={head}:{HEAD_PORT}"]
        environment = {**_RAY, **token_environment(token)}
        for tries_left in reversed(range(_STARTS)):
            program = self.run(command, env=environment)
            if program.says("Ray runtime started", START_S):
                self._ray.append(program)
                return
            assert tries_left and "timed out during startup" in program.output, program.output
            self.call([BIN / "ray", "stop", "--force"], timeout_s=START_S)

    @property
    def ray_ended(self) -> bool:
        """Whether the node's newest raylet has ended, and with it all that it started."""
        return self._ray[-1].ended

    def cut(self) -> None:
        """Pull the cable: packets are dropped, and nobody is told."""
        self._port("nomaster")

    def join(self) -> None:
        """Plug it in again."""
        self._port("master", _BRIDGE)

    def _port(self, *change: str) -> None:
        assert self._bridge is not None, f"{self.name} has no cable: the bridge is in it"
        self._bridge.ip("link", "set", _port_of(self.name), *change)

    def kill(self) -> None:
        """All of the node's processes at once, and with the last of them its network and memory."""
        children = psutil.Process(self._holder.pid).children() if self._holder.poll() is None else []
        self._holder.kill()
        self._holder.wait()
        for pipe in (self._holder.stdin, self._holder.stdout):
            if pipe is not None:
                pipe.close()
        # The first process of its namespace ends when all others have.
        wait_until(lambda: not any(alive(child.pid) for child in children), _ENDED_S, lambda: f"{self.name} is alive")


@dataclass(frozen=True)
class Nodes:
    """`outside` is on the bridge, and in no cluster. `shared` is a folder that all of them see at the same path."""

    head: Node
    workers: tuple[Node, Node]
    outside: Node
    shared: Path

    def __iter__(self) -> Iterator[Node]:
        return iter((self.head, *self.workers))


def token_environment(token: Path | None) -> dict[str, str]:
    """Variables for whoever shows the token in file `token`."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} if token else {"RAY_AUTH_MODE": "disabled"}


@contextmanager
def three_nodes(folder: Path) -> Iterator[Nodes]:
    """A head, two workers and an outside, gone at the end whatever happened. Their files stay in `folder`."""
    shared = folder / "shared"
    for path in (shared, *WARM.values()):
        path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        outside = _node(_OUTSIDE, folder, shared, stack)
        outside.ip("link", "add", _BRIDGE, "type", "bridge", "forward_delay", "0", "stp_state", "0")
        _set_up(outside, _BRIDGE)
        nodes = [_node(place, folder, shared, stack, outside) for place in (_HEAD, *_WORKERS)]
        for node in nodes:
            end = ("peer", "name", "eth0", "netns", str(node.init))
            outside.ip("link", "add", _port_of(node.name), "type", "veth", *end)
            outside.ip("link", "set", _port_of(node.name), "master", _BRIDGE, "up")
            _set_up(node, "eth0")
        head, first, second = nodes
        yield Nodes(head, (first, second), outside, shared)


def _node(place: tuple[str, int], folder: Path, shared: Path, stack: ExitStack, bridge: Node | None = None) -> Node:
    """A node without an address yet; `stack` ends it."""
    name, number = place
    own = folder / name
    (own / "tmp").mkdir(parents=True)
    hosts = "".join(f"{_SUBNET}.{other} {host}\n" for host, other in (_OUTSIDE, _HEAD, *_WORKERS))
    spec = {
        "name": name,
        "hosts": f"127.0.0.1 localhost\n{hosts}",
        "folder": str(own),
        "kept": [str(path) for path in (shared, ROOT, Path(sys.prefix), Path(sys.base_prefix), *WARM.values())],
        "shm_bytes": _GIB,
    }
    program = [sys.executable, "-I", str(Path(__file__).with_name("node_init.py")), json.dumps(spec)]
    holder = subprocess.Popen(
        ["unshare", *_UNSHARED, "--fork", "--kill-child", "--mount-proc", *program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    node = Node(name, f"{_SUBNET}.{number}", own, holder, bridge)
    stack.callback(node.kill)
    assert holder.stdout is not None and holder.stdout.readline() == b"ready\n", f"{name} did not start"
    return node


def _set_up(node: Node, interface: str) -> None:
    """Its one address; there is no route beyond it."""
    node.ip("link", "set", "lo", "up")
    node.ip("address", "add", f"{node.address}/24", "dev", interface)
    node.ip("link", "set", interface, "up")


def _port_of(name: str) -> str:
    """The end of a node's cable at the bridge."""
    return f"to-{name}"


def _environment() -> dict[str, str]:
    path = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"HOME": "/tmp/home", "PATH": path, **{name: str(folder) for name, folder in WARM.items()}}


def _checked(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SHORT_S)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
