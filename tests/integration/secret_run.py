"""A whole GRPO run on what a judge and people say, with secrets in its environment and hostile prompts."""

import json
import os
import re
import secrets
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from recipes.commands.failures import WAITING
from tests.integration.job_cluster import Cluster, files, submission
from tests.integration.played_reviews import Reviewer
from tests.integration.tiny import (
    SMALLEST,
    SPREAD_SCORES,
    START_S,
    Watched,
    campaign_record,
    command_line,
    command_line_of,
)
from tests.judges import Asked, Reply, goodness, reasoned, serving

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
    "JUDGE_KEY": SECRET,
    "AZURE_STORAGE_CONNECTION_STRING": f"AccountName=a;AccountKey={SECRET}",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": SECRET,
}
OF_NODES = {name: value for name, value in SECRETS.items() if not name.startswith("RAY_")}
"""What a cluster's nodes have for the runs on it; the token of the cluster itself is its own."""
RECIPE = "recipes/grpo_smollm2.yaml"
NAMES = ("../../../etc/x", "/etc/passwd", "a\0b", "x" * 400, "<script>alert(1)</script>", "..", "~/x", "a/b")
PICKLED = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""First bytes of pickles, and of the archives that torch.save makes of them."""


def save_prompts(folder: Path) -> None:
    """Ids that look like paths, in a column that others call ids and in columns named so; prompts with HTML."""
    rows = [
        {"prompt": f"Write <b onclick=alert({number})>{name[:40]}</b>.", "id": name, "prompt_id": name, name: name}
        for number, name in enumerate(NAMES)
    ]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@dataclass
class Seen:
    """Command lines of processes, and the environments of drivers and scoring processes by command line."""

    lines: set[str] = field(default_factory=set)
    environments: dict[str, bytes] = field(default_factory=dict)

    def watch(self, run: Watched, *owners: Watched) -> None:
        """All processes of `owners`, again and again until the run ends."""
        deadline = time.monotonic() + START_S + 200
        while not run.ended:
            assert time.monotonic() < deadline, run.output
            for owner in owners:
                for pid, line in owner.processes().items():
                    self._see(pid, line)
            time.sleep(0.1)

    def _see(self, pid: int, line: str) -> None:
        self.lines.add(line)
        if "raylign.scoring.worker" in line or "recipes.commands.cli run" in line:
            with suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                # A child that has only just begun its own program had the command line of its parent.
                if command_line_of(pid) == line:
                    self.environments[f"{pid} {line}"] = environment


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)


@dataclass(frozen=True)
class Finished:
    """A run that ended well, and what was seen of it meanwhile."""

    folder: Path
    before: set[Path]
    """Files in `folder` before the run."""
    name: str
    settings: Sequence[str]
    ray_folder: Path
    """Of the private cluster that it began on."""
    begun: str
    """What it printed until it waited for people."""
    submitted: str
    """What the submission printed that went on with it."""
    job_log: str
    seen: Seen
    asked: list[Asked]
    """What the judge was asked."""
    logs: str
    """Of the actors."""

    @property
    def run(self) -> Path:
        return self.folder / "runs" / self.name


def never_tied(asked: Asked) -> Reply:
    """Good words first, then whatever differs: random texts need a winner too."""
    texts = [asked.data(name) for name in (("answer",) if asked.is_rating else ("answer A", "answer B"))]
    keys = [(goodness(text), zlib.crc32(text.encode())) for text in texts]
    return Reply(str(1 + keys[0][1] % 10) if asked.is_rating else "A" if keys[0] > keys[1] else "B")


def preferred(answer_a: str, answer_b: str) -> object:
    """A person with a firm opinion of any two texts."""
    return "A" if zlib.crc32(answer_a.encode()) > zlib.crc32(answer_b.encode()) else "B"


@contextmanager
def finished_run(cluster: Cluster, checkout: Path, folder: Path) -> Iterator[Finished]:
    """Begun on this machine, where it waits for people, and gone on with as the first job of `cluster`.

    GRPO of the embedded model by a judge and people, with a gold scorer, on hostile prompts; `cluster` has `OF_NODES`
    around it.
    """
    (folder / "spread.py").write_text(SPREAD_SCORES)
    save_prompts(folder)
    before = set(files(folder))
    name = f"quiet-{os.getpid()}"
    settings = (
        *(setting for setting in SMALLEST if not setting.startswith("pairing.")),
        *(f"run.dir={folder / 'runs'}", f"run.name={name}", f"prompts.source={folder / 'prompts.jsonl'}"),
        *("evaluation.gold={type: function, function: 'spread:score'}",),
        "trainer.per_device_train_batch_size=1",
    )
    seen = Seen()
    temporary = tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp", ignore_cleanup_errors=True)
    with serving(reasoned(never_tied)) as server, temporary as ray_folder:
        options = "model: judge-1, api_key_env: JUDGE_KEY, batch_size: 4, reasons: true"
        judge = f"judge: {{type: judge, base_url: '{server.base_url}', {options}}}"
        people = "people: {type: human, held_out: {type: function, function: 'spread:score'}}"
        scoring = f"scoring={{type: weighted, weights: {{judge: 1, people: 1}}, scorers: {{{judge}, {people}}}}}"
        settings = (*settings, scoring)
        with Watched(command_line(*settings, recipe=RECIPE), folder, RAY_TMPDIR=ray_folder, **SECRETS) as run:
            seen.watch(run, run)
            assert run.finish(START_S)[0] == WAITING, run.output
            begun = run.output
        assert campaign_record(folder / "runs").info.status == "SCHEDULED"
        ann = Reviewer(f"sqlite:///{folder}/runs/mlflow.db", f"{name}: pairs", experiment="raylign")
        ann.answer(ann.items(), preferred)
        command = submission("--working-dir", str(checkout), str(checkout / RECIPE), *settings)
        with Watched(command, folder, **cluster.environment) as going_on:
            seen.watch(going_on, going_on, cluster.head)
            assert going_on.finish(START_S)[0] == 0, going_on.output
            submitted = going_on.output
        (job,) = re.findall(r"^submitted to .*: job (raysubmit_\w+)$", submitted, re.MULTILINE)
        logs = "".join(path.read_text(errors="replace") for path in Path(ray_folder).rglob("worker-*.err"))
        yield Finished(
            folder=folder,
            before=before,
            name=name,
            settings=settings,
            ray_folder=Path(ray_folder),
            begun=begun,
            submitted=submitted,
            job_log=cluster.job_log(job),
            seen=seen,
            asked=server.asked,
            logs=logs + cluster.worker_logs(),
        )
