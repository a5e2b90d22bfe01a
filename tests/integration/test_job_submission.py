"""The recipe as a Ray job: only the uploaded folder and the installed packages are on the cluster."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from raylign.run.directory import open_run
from raylign.tracking.journal import read_events
from recipes.commands.cli import app
from tests.faults import record
from tests.integration.tiny import (
    LONG_TRAINING,
    RECIPE,
    ROOT,
    SMALLEST,
    SPREAD_SCORES,
    START_S,
    Watched,
    campaign_record,
    clean_environment,
    synced_record,
    wait_until,
    weight_folders,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

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
SMALL_MB = 3.0
STOP_S = 400.0


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

    def asked(self, method: str, path: str = "", *, token: str | None = None) -> httpx.Response:
        """What the job server answers, by default to who has its token."""
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"}
        return httpx.request(method, f"{self.dashboard}/api/jobs/{path}", headers=headers, timeout=START_S)

    def is_ready(self) -> bool:
        try:
            return self.asked("GET").is_success
        except httpx.TransportError:
            return False

    def submit(self, *arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
        """`raylign submit` of the recipe in `cwd`, with the code of this checkout and other variables if need be."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "recipes.commands.cli", "submit", RECIPE, *arguments],
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
        files = [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]
        shown = [str(path) for path in files if secret.encode() in path.read_bytes()]
        return shown + [line for line in self.head.processes().values() if secret in line]

    def job_log(self, job: str) -> str:
        """What the job's driver printed, as it is on the head node."""
        (path,) = self.folder.glob(f"session_2*/logs/job-driver-{job}.log")
        return path.read_bytes().decode(errors="replace")

    def worker_logs(self) -> str:
        return "".join(path.read_text(errors="replace") for path in self.folder.glob("session_2*/logs/worker-*.err"))

    def snapshots(self) -> list[Path]:
        """The uploaded folders as the cluster unpacked them."""
        return sorted(self.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources that says where it is imported from, with outputs that must not be uploaded."""
    copy = tmp_path_factory.mktemp("copy")
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
    return copy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`ray start --head` on loopback, on free ports, with a token."""
    folder = tmp_path_factory.mktemp("head")
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
        with _started(command, folder, {**token, **path, "RAY_worker_niceness": "0"}) as head:
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


@pytest.mark.fault
def test_without_the_token_nothing_is_submitted(cluster: Cluster, checkout: Path, tmp_path: Path) -> None:
    assert cluster.asked("GET", token="").status_code == HTTPStatus.UNAUTHORIZED
    (tmp_path / "other").write_text("f" * 64)
    for extra, given in (
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token and got none; "),
        ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}, "asks for a token and got another; "),
        ({"RAY_AUTH_TOKEN_PATH": "", "HOME": str(tmp_path)}, "RAY_AUTH_MODE=token, but there is no token; "),
    ):
        done = cluster.submit(*SMALLEST, f"run.dir={tmp_path}", cwd=checkout, **extra)
        assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout
        assert given in done.stdout and "set RAY_AUTH_MODE=token and give" in done.stdout, done.stdout
    assert cluster.asked("GET").json() == []
    record(
        "submitting without the token", "no token, another one, an empty home", lost="nothing: refused, with the cure"
    )


@pytest.mark.fault
def test_secrets_reach_neither_the_command_nor_the_runtime_environment(
    cluster: Cluster, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with the token in hand; the cluster, asked for every job, has none of them."""
    monkeypatch.chdir(checkout)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.setenv(name, cluster.environment[name])

    def refused(*settings: str) -> str:
        done = CliRunner().invoke(app, ["submit", RECIPE, *SMALLEST, f"run.dir={tmp_path}", *settings])
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.output
        assert "Traceback" not in done.output and hush not in done.output
        return done.output

    hush = f"hush{secrets.token_hex(8)}"
    environment = checkout / RUNTIME_ENV
    whole = environment.read_text()
    added = (
        *(f"env_vars: {{{name}: {hush}}}" for name in ("DB_PASS", "PGPASSWORD", "GITHUB_PAT")),
        f"env_vars: {{AZURE_STORAGE_CONNECTION_STRING: 'AccountName=a;AccountKey={hush}'}}",
        f"pip: ['pkg @ git+https://me:{hush}@host/r.git']",
        f"pip: {{packages: ['--index-url https://{hush}@host/simple', pkg]}}",
    )
    try:
        for text in added:
            environment.write_text(text)
            told = refused()
            assert f"{environment}: " in told and "looks like a secret" in told and "nodes" in told, told
    finally:
        environment.write_text(whole)
    for setting in (f"tracking.password={hush}", f"tracking.uri=http://me:{hush}@mlflow:5000"):
        told = refused(setting)
        assert "before `ray start`" in told, told
    assert hush not in cluster.asked("GET").text and cluster.holders_of(hush) == []
    record(
        "submitting secrets to a cluster with a token",
        f"{len(added)} runtime environments and 2 settings",
        lost="nothing: refused, no job has them",
    )


def test_a_job_runs_on_its_snapshot_alone_and_again(
    cluster: Cluster, checkout: Path, served_llama: str, tmp_path: Path
) -> None:
    shared, name = tmp_path / "shared", f"submitted-{os.getpid()}"
    model = (f"model.path={served_llama}", "scoring.function=spread:score")
    settings = (*SMALLEST, *model, f"run.dir={shared}", f"run.name={name}")
    done = cluster.submit(*settings, cwd=checkout)
    output = done.stdout
    assert done.returncode == 0, output
    assert output.startswith(f"submitted to {cluster.dashboard}: job raysubmit_"), "Ray's own talk is left out"
    (job,) = re.findall(r"^submitted to .*: job (raysubmit_\w+)$", output, re.MULTILINE)
    assert f"ray job stop --address {cluster.dashboard} {job}" in output
    (follow,) = re.findall(r"^follow it: ray (.*)$", output, re.MULTILINE)
    assert "round 1: held-out score" in cluster.ray(*follow.split())
    assert f"job {job} ended with status 0\n" in output
    assert cluster.token not in output and cluster.holders_of(cluster.token) == []

    (snapshot,) = cluster.snapshots()
    expected = {name: {str(snapshot / folder / "__init__.py")} for name, folder in PACKAGES.items()}
    assert imported(output) == expected
    in_actors = imported(cluster.worker_logs())
    assert {name: in_actors[name] for name in ("raylign", "actors")} == {
        name: expected[name] for name in ("raylign", "actors")
    }

    files = {path for path in snapshot.rglob("*") if path.is_file()}
    assert [output for output in OUTPUTS if snapshot / output in files] == []
    megabytes = sum(path.stat().st_size for path in files if path.suffix != ".pyc") / 1e6
    print(f"snapshot: {len(files)} files, {megabytes:.2f} MB")
    assert megabytes < SMALL_MB

    directory = open_run(shared / name)
    (report,) = directory.reports()
    preferences = pq.read_table(directory.round(1) / "preferences.parquet")
    assert report.counts["preferences"] == preferences.num_rows > 0
    assert (directory.checkpoint(1) / "adapter_model.safetensors").is_file()
    assert campaign_record(shared).info.status == "FINISHED"
    assert "round 1 train 1/1 steps in " in output
    assert re.search(r"^round 1: held-out score ", output, re.MULTILINE)
    log = cluster.job_log(job)
    assert not set("\x1b\r\b") & set(log)
    assert "Traceback" not in log
    assert weight_folders(name) == []

    again = cluster.submit(*settings, cwd=checkout)
    assert (again.returncode, "all 1 rounds are done" in again.stdout) == (0, True), again.stdout


def test_the_status_of_a_job_is_that_of_its_submission(cluster: Cluster, checkout: Path, tmp_path: Path) -> None:
    done = cluster.submit(*SMALLEST, f"run.dir={tmp_path}", "prompts.source=/none.jsonl", cwd=checkout)
    assert done.returncode == 1, done.stdout
    assert "error: /none.jsonl: no such file or folder" in done.stdout
    assert "ended with status 1; the same command goes on with it" in done.stdout


def test_a_stopped_job_cleans_up_after_itself(
    cluster: Cluster, checkout: Path, served_llama: str, tmp_path: Path
) -> None:
    environment = yaml.safe_load((checkout / RUNTIME_ENV).read_text())
    environment["env_vars"]["VLLM_LOGGING_LEVEL"] = "INFO"  # also set by the run itself, which must not clash
    run = tmp_path / f"shared/stopped-{os.getpid()}"
    cluster.ray(
        *("job", "submit", "--no-wait", "--working-dir", ".", "--runtime-env-json", json.dumps(environment)),
        *("--submission-id", "stopped", "--", "python", "recipes/online_dpo.py", RECIPE, *SMALLEST, *LONG_TRAINING),
        *(f"run.dir={run.parent}", f"run.name={run.name}", f"model.path={served_llama}"),
        "scoring.function=spread:score",
        cwd=checkout,
    )

    def steps() -> int:
        journal = run / "events.jsonl"
        return sum(event.name == "step" for event in read_events(journal)) if journal.is_file() else 0

    wait_until(lambda: steps() > 0, 2 * START_S, lambda: cluster.job_log("stopped"))
    segments = cluster.head.shared_memory()
    # As `ray job stop` does, without the seconds that this command takes to start while the run takes steps.
    assert cluster.asked("POST", "stopped/stop").json() == {"stopped": True}
    wait_until(lambda: cluster.asked("GET", "stopped").json()["status"] == "STOPPED", STOP_S, cluster.worker_logs)
    assert "Job stopped has been terminated gracefully with SIGTERM" in cluster.worker_logs()
    last = list(read_events(run / "events.jsonl"))[-1]
    assert (last.name, last.payload["status"]) == ("campaign_finished", "KILLED")
    assert synced_record(run).info.status == "KILLED"
    assert "Traceback" not in cluster.job_log("stopped")

    def ours() -> list[str]:
        names = (
            "online_dpo.py",
            "ray::Generator",
            "ray::TrainerRank",
            "ray::ScorerProcess",
            "EngineCore",
            "raylign.scoring",
        )
        return [line for line in cluster.head.processes().values() if any(name in line for name in names)]

    wait_until(lambda: not ours(), STOP_S, lambda: f"processes are left: {ours()}")
    assert weight_folders(run.name) == []
    assert [path for path in segments if path.exists()] == []
