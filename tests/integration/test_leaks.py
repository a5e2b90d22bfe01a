"""A whole run with secrets in its environment and hostile prompts: what it leaves behind, shows and passes on."""

import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import ray

from actors.cluster import actor_environment, cluster
from tests.faults import record
from tests.integration.tiny import SMALLEST, SPREAD_SCORES, START_S, Watched, command_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SECRET = f"hush{secrets.token_hex(30)}"
SECRETS = {
    "HF_TOKEN": SECRET,
    "OPENAI_API_KEY": SECRET,
    "MLFLOW_TRACKING_USERNAME": "me",
    "MLFLOW_TRACKING_PASSWORD": SECRET,
    "DATABASE_URL": f"postgresql://me:{SECRET}@127.0.0.1/db",
    "DB_PASS": SECRET,
    "PGPASSWORD": SECRET,
    "GITHUB_PAT": SECRET,
    "AZURE_STORAGE_CONNECTION_STRING": f"AccountName=a;AccountKey={SECRET}",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": SECRET,
}
NAMES = ("../../../etc/x", "/etc/passwd", "a\0b", "x" * 400, "<script>alert(1)</script>", "..", "~/x", "a/b")
PICKLED = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""First bytes of pickles, and of the archives that torch.save makes of them."""


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def save_prompts(folder: Path) -> None:
    """Ids that look like paths, in a column that others call ids and in columns named so; prompts with HTML."""
    rows = [
        {"prompt": f"Write <b onclick=alert({number})>{name[:40]}</b>.", "id": name, "prompt_id": name, name: name}
        for number, name in enumerate(NAMES)
    ]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def holders(folder: Path) -> list[str]:
    return [str(path) for path in files(folder) if SECRET.encode() in path.read_bytes()]


def watch(run: Watched) -> tuple[set[str], dict[str, bytes]]:
    """Every command line until the run ends, and the environments of driver and scoring processes by command line."""
    lines: set[str] = set()
    environments: dict[str, bytes] = {}
    deadline = time.monotonic() + START_S + 200
    while not run.ended:
        assert time.monotonic() < deadline, run.output
        for pid, line in run.processes().items():
            lines.add(line)
            if "raylign.scoring.worker" in line or "recipes.commands.cli" in line:
                try:
                    environments[f"{pid} {line}"] = Path(f"/proc/{pid}/environ").read_bytes()
                except OSError:
                    continue
        time.sleep(0.1)
    return lines, environments


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)


@pytest.mark.fault
def test_a_run_keeps_secrets_to_itself_and_hostile_prompts_stay_data(
    served_llama: str, tmp_path: Path, ray_folder: Path
) -> None:
    (tmp_path / "spread.py").write_text(SPREAD_SCORES)
    save_prompts(tmp_path)
    before = set(files(tmp_path))
    settings = (
        *SMALLEST,
        *("run.dir=runs", "run.name=quiet", "prompts.source=prompts.jsonl", "scoring.function=spread:score"),
        f"model.path={served_llama}",
    )
    with Watched(command_line(*settings), tmp_path, RAY_TMPDIR=str(ray_folder), **SECRETS) as run:
        lines, environments = watch(run)
        output = run.output
        assert run.finish(START_S)[0] == 0, output

    assert any("raylet" in line for line in lines), "the watch saw the processes"
    driver = [environment for line, environment in environments.items() if "recipes.commands.cli" in line]
    scoring = [environment for line, environment in environments.items() if "recipes.commands.cli" not in line]
    assert driver and all(environment.count(SECRET.encode()) == 9 for environment in driver), "the run had them"
    assert SECRET not in output
    assert [line for line in lines if SECRET in line] == []
    assert scoring and all(b"PATH=" in environment for environment in scoring)
    assert not any(SECRET.encode() in environment for environment in scoring)
    assert holders(tmp_path) == [] and holders(ray_folder) == []
    assert any("mlflow.db" in path.name for path in files(tmp_path))

    run_directory = tmp_path / "runs/quiet"
    assert [path for path in files(run_directory) if path.suffix in PICKLED] == []
    assert [path for path in files(run_directory) if path.read_bytes()[:4].startswith(PICKLE_STARTS)] == []

    made = {path.relative_to(tmp_path).parts[:2] for path in set(files(tmp_path)) - before}
    made_in_runs = {parts[1] for parts in made if parts[0] == "runs"}
    assert {parts[0] for parts in made if parts[0] != "runs" and not parts[0].startswith("output-")} <= {"__pycache__"}
    assert made_in_runs <= {"quiet", "mlflow.db", "mlartifacts", ".mlflow.db.lock"}
    pages = [path for path in files(tmp_path / "runs/mlartifacts") if path.suffix == ".html"]
    assert any("onclick" in page.read_text() for page in pages), "MLflow has pages of the tables"
    assert all(Elements(page.read_text()).found.isdisjoint({"b", "script"}) for page in pages)
    record("secrets and hostile prompts in a run", "nine secrets, path-like ids, HTML", lost="nothing")


def test_the_runtime_environment_of_actors_has_no_secrets(no_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in SECRETS.items():
        if not name.startswith("RAY_"):
            monkeypatch.setenv(name, value)
    with cluster(num_cpus=1):
        seen = ray.remote(lambda: json.dumps(dict(ray.get_runtime_context().runtime_env)))
        texts = [json.dumps(dict(ray.get_runtime_context().runtime_env)), ray.get(seen.remote())]
        inherited = ray.remote(lambda: dict(os.environ))
        wanted = actor_environment(private=True)
        assert wanted.items() <= ray.get(inherited.remote()).items()
    joined = json.dumps(actor_environment())
    assert "PATH" in joined and all(SECRET not in text for text in [*texts, joined]), texts
    assert os.environ["HF_TOKEN"] == SECRET
