"""A Ray cluster that takes jobs, and a copy of the sources to submit to it."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.integration.tiny import ROOT, SPREAD_SCORES, START_S, Watched, clean_environment, wait_until

BIN = Path(sys.executable).parent
RUNTIME_ENV = "deploy/ray_runtime_env.yaml"
UPLOADED = ("platform", "actors", "recipes", "deploy", ".gitignore", "pyproject.toml", "README.md")
OUTPUTS = (
    "runs/demo/checkpoints/0001/weights.bin",
    "runs/mlflow.db",
    "mlruns/0/meta.yaml",
    ".venv/bin/python",
    ".cache/kernels.so",
    "recipes/policy.safetensors",
    "deploy/__pycache__/old.pyc",
    ".git/HEAD",
)
TELL = '\nimport sys\n\nprint(f"imported {__name__} from {__file__}", file=sys.stderr)\n'
PACKAGES = {"raylign": "platform/raylign", "actors": "actors", "recipes": "recipes"}


def submission(*arguments: str) -> list[str]:
    """`raylign submit` with the code of this checkout."""
    return [sys.executable, "-P", "-m", "recipes.commands.cli", "submit", *arguments]


@dataclass(frozen=True)
class Cluster:
    """A one-node cluster of the test's own. `environment` is for Ray's commands, token included."""

    head: Watched
    folder: Path
    dashboard: str
    environment: Mapping[str, str]

    def ray(self, *arguments: str, cwd: Path | None = None) -> str:
        """Output of a `ray` command that must succeed, without the colours of Ray's own lines."""
        done = subprocess.run(
            [BIN / "ray", *arguments],
            cwd=cwd,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return re.sub(r"\x1b\[\d+m", "", done.stdout)

    def asked(self, method: str, path: str = "") -> httpx.Response:
        """What the job server answers whoever has the token."""
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.request(method, f"{self.dashboard}/api/jobs/{path}", headers=headers, timeout=START_S)

    def is_ready(self) -> bool:
        try:
            return self.asked("GET").is_success
        except httpx.TransportError:
            return False

    def submit(self, *arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
        """`submission` of what is in `cwd`, with other variables if need be, until its end."""
        return subprocess.run(
            submission(*arguments),
            cwd=cwd,
            env={**self.environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}", **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * START_S,
            check=False,
        )

    @property
    def token(self) -> str:
        return Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()

    def holders_of(self, secret: str) -> list[str]:
        """Files of the cluster and command lines of its processes that show it."""
        return holders(self.folder, secret) + [line for line in self.head.processes().values() if secret in line]

    def job_log(self, job: str) -> str:
        """What the job's driver printed, as it is on the head node."""
        (path,) = self.folder.glob(f"session_2*/logs/job-driver-{job}.log")
        return path.read_bytes().decode(errors="replace")

    def worker_logs(self) -> str:
        return "".join(path.read_text(errors="replace") for path in self.folder.glob("session_2*/logs/worker-*.err"))

    def snapshots(self) -> list[Path]:
        """The uploaded folders as the cluster unpacked them."""
        return sorted(self.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))


def files(folder: Path) -> list[Path]:
    """Those inside that are no links. What comes or goes meanwhile, as in Ray's own folders, is there or not."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def holders(folder: Path, secret: str) -> list[str]:
    """Files that show it."""
    shown = []
    for path in files(folder):
        with suppress(FileNotFoundError):
            shown += [str(path)] if secret.encode() in path.read_bytes() else []
    return shown


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def copy_sources(copy: Path) -> None:
    """A copy of the sources that says where it is imported from, with outputs that must not be uploaded."""
    for name in UPLOADED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    for folder in PACKAGES.values():
        with (copy / folder / "__init__.py").open("a") as module:
            module.write(TELL)
    for output in OUTPUTS:
        (copy / output).parent.mkdir(parents=True, exist_ok=True)
        (copy / output).write_bytes(secrets.token_bytes(100_000))
    (copy / "spread.py").write_text(SPREAD_SCORES)


@contextmanager
def started(folder: Path, around: Mapping[str, str]) -> Iterator[Cluster]:
    """`ray start --head` on loopback, on free ports, with a token and with the variables `around` it."""
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    port, dashboard, client, agent, agent_grpc, metrics, runtime_env = free_ports(7)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    path = {"PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": "", "RAY_DISABLE_DASHBOARD_LOG_INFO": "1"}
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp", ignore_cleanup_errors=True) as short:
        command = [
            *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *("--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={short}"),
            *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}"),
            *(f"--runtime-env-agent-port={runtime_env}", "--min-worker-port=0", "--max-worker-port=0"),
        ]
        # As in clusters that raylign starts: Ray's workers would wait for whatever else the machine does.
        with _started(command, folder, {**around, **token, **path, "RAY_worker_niceness": "0"}) as head:
            address = f"http://127.0.0.1:{dashboard}"
            environment = clean_environment({**token, **path, "RAY_ADDRESS": address})
            found = Cluster(head, Path(short), address, environment)
            wait_until(found.is_ready, START_S, lambda: head.output)
            yield found


def _started(command: list[str], folder: Path, environment: Mapping[str, str]) -> Watched:
    """Once more when the head is late: Ray gives it 30 seconds, by a constant of its own."""
    head = Watched(command, folder, **environment)
    wait_until(lambda: "Ray runtime started" in head.output or head.ended, START_S, lambda: head.output)
    if not head.ended:
        return head
    head.__exit__(None, None, None)
    assert "timed out during startup" in head.output, head.output
    return _started(command, folder, environment)


def imported(text: str) -> dict[str, set[str]]:
    """Files that each package was imported from, as the copies say."""
    found: dict[str, set[str]] = {}
    for name, file in re.findall(r"^.*imported (\w+) from (\S+)$", text, re.MULTILINE):
        found.setdefault(name, set()).add(file)
    return found
