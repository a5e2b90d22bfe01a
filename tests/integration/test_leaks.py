"""A whole GRPO run on what a judge and people say, with secrets in its environment and hostile prompts.

What it leaves behind, shows and passes on, and that it waits for answers and trains on them.
"""

import json
import re
import secrets
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as pq
import pytest

from raylign.review.record import ReviewRecord
from raylign.run.directory import open_run
from raylign.run.tables import read_candidates
from raylign.scoring.judge_client import QUESTIONS
from recipes.commands.failures import WAITING
from tests.faults import record
from tests.integration.played_reviews import Reviewer
from tests.integration.tiny import (
    SMALLEST,
    SPREAD_SCORES,
    START_S,
    Watched,
    campaign_record,
    command_line,
    foreign_lines,
)
from tests.judges import Asked, Reply, goodness, reasoned, serving

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
    "JUDGE_KEY": SECRET,
    "AZURE_STORAGE_CONNECTION_STRING": f"AccountName=a;AccountKey={SECRET}",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": SECRET,
}
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


@dataclass(frozen=True)
class Finished:
    """A run that ended well, and what was seen of it meanwhile."""

    folder: Path
    before: set[Path]
    """Files in `folder` before the run."""
    ray_folder: Path
    output: str
    lines: set[str]
    environments: dict[str, bytes]
    asked: list[Asked]
    """What the judge was asked."""
    logs: str
    """Of the actors."""


def never_tied(asked: Asked) -> Reply:
    """Good words first, then whatever differs: random texts need a winner too."""
    texts = [asked.data(name) for name in (("answer",) if asked.is_rating else ("answer A", "answer B"))]
    keys = [(goodness(text), zlib.crc32(text.encode())) for text in texts]
    return Reply(str(1 + keys[0][1] % 10) if asked.is_rating else "A" if keys[0] > keys[1] else "B")


def preferred(answer_a: str, answer_b: str) -> object:
    """A person with a firm opinion of any two texts."""
    return "A" if zlib.crc32(answer_a.encode()) > zlib.crc32(answer_b.encode()) else "B"


@pytest.fixture(scope="module")
def finished(served_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """GRPO by a judge and people, with a gold scorer, on hostile prompts and with secrets around: two starts."""
    folder = tmp_path_factory.mktemp("quiet")
    (folder / "spread.py").write_text(SPREAD_SCORES)
    save_prompts(folder)
    before = set(files(folder))
    settings = (
        *(setting for setting in SMALLEST if not setting.startswith("pairing.")),
        *("run.dir=runs", "run.name=quiet", "prompts.source=prompts.jsonl"),
        *("evaluation.gold={type: function, function: 'spread:score'}",),
        *(f"model.path={served_llama}", "trainer.per_device_train_batch_size=1"),
    )
    temporary = tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp", ignore_cleanup_errors=True)
    with serving(reasoned(never_tied)) as server, temporary as ray_folder:
        options = "model: judge-1, api_key_env: JUDGE_KEY, batch_size: 4, reasons: true"
        judge = f"judge: {{type: judge, base_url: '{server.base_url}', {options}}}"
        people = "people: {type: human, held_out: {type: function, function: 'spread:score'}}"
        scoring = f"scoring={{type: weighted, weights: {{judge: 1, people: 1}}, scorers: {{{judge}, {people}}}}}"
        command = command_line(*settings, scoring, recipe="recipes/grpo_smollm2.yaml")
        output, lines, environments = "", set[str](), dict[str, bytes]()
        for status in (WAITING, 0):
            with Watched(command, folder, RAY_TMPDIR=ray_folder, **SECRETS) as run:
                seen, others = watch(run)
                lines, environments, output = lines | seen, environments | others, output + run.output
                assert run.finish(START_S)[0] == status, output
            if status == WAITING:
                assert campaign_record(folder / "runs").info.status == "SCHEDULED"
                ann = Reviewer(f"sqlite:///{folder}/runs/mlflow.db", "quiet: pairs", experiment="raylign")
                ann.answer(ann.items(), preferred)
        logs = "".join(path.read_text(errors="replace") for path in Path(ray_folder).rglob("worker-*.err"))
        yield Finished(folder, before, Path(ray_folder), output, lines, environments, server.asked, logs)


@pytest.mark.fault
def test_a_run_keeps_secrets_to_itself_and_hostile_prompts_stay_data(finished: Finished) -> None:
    folder, lines = finished.folder, finished.lines
    assert any("raylet" in line for line in lines), "the watch saw the processes"
    environments = finished.environments.items()
    driver = [environment for line, environment in environments if "recipes.commands.cli" in line]
    scoring = [environment for line, environment in environments if "recipes.commands.cli" not in line]
    assert driver and all(environment.count(SECRET.encode()) == 10 for environment in driver), "the run had them"
    assert SECRET not in finished.output
    assert [line for line in lines if SECRET in line] == []
    assert scoring and all(b"PATH=" in environment for environment in scoring)
    assert not any(SECRET.encode() in environment for environment in scoring)
    assert holders(folder) == [] and holders(finished.ray_folder) == []
    assert any("mlflow.db" in path.name for path in files(folder))

    run_directory = folder / "runs/quiet"
    assert [path for path in files(run_directory) if path.suffix in PICKLED] == []
    assert [path for path in files(run_directory) if path.read_bytes()[:4].startswith(PICKLE_STARTS)] == []

    made = {path.relative_to(folder).parts[:2] for path in set(files(folder)) - finished.before}
    made_in_runs = {parts[1] for parts in made if parts[0] == "runs"}
    assert {parts[0] for parts in made if parts[0] != "runs" and not parts[0].startswith("output-")} <= {"__pycache__"}
    assert made_in_runs <= {"quiet", "mlflow.db", "mlartifacts", ".mlflow.db.lock"}
    pages = [path for path in files(folder / "runs/mlartifacts") if path.suffix == ".html"]
    assert any("onclick" in page.read_text() for page in pages), "MLflow has pages of the tables"
    assert all(Elements(page.read_text()).found.isdisjoint({"b", "script"}) for page in pages)
    record("secrets and hostile prompts in a run", "ten secrets, path-like ids, HTML", lost="nothing")


def test_the_recipe_trains_groups_and_says_what_trl_would(finished: Finished) -> None:
    """Real engines: the ratios of a round's first step are 1, and the generator's log-probs are the trainer's."""
    assert foreign_lines(finished.output) == []
    directory = open_run(finished.folder / "runs/quiet")
    ((first, *others),) = (report.steps for report in directory.reports())
    assert others and first["clip_ratio/region_mean"] == 0.0 and first["rewards/margins"] == 0.0
    assert first["sampling/sampling_logp_difference/mean"] < 1e-3
    assert others[0]["rewards/margins"] != 0.0
    rows = pq.read_table(directory.round(1) / "preferences.parquet").to_pylist()
    assert {len(row["token_ids"]) for row in rows} == {3}
    for row in rows:
        assert [len(values) for values in row["old_logprobs"]] == [len(ids) for ids in row["token_ids"]]
        assert row["reference_logprobs"] is None


def test_a_judge_compares_in_both_orders_and_rates_what_is_held_out(finished: Finished) -> None:
    assert {asked.authorization for asked in finished.asked} == {f"Bearer {SECRET}"}
    rounds = finished.folder / "runs/quiet/rounds"
    rows = pq.read_table(rounds / "0001/candidates.parquet").to_pylist()
    shares: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        shares[row["prompt_id"]].append(json.loads(row["score_parts"])["judge"])
    assert len(shares) == 4 and all(sorted(share) == [0.0, 0.5, 1.0] for share in shares.values())
    before, held_out = (pq.read_table(rounds / f"{number}/samples.parquet").to_pylist() for number in ("0000", "0001"))
    ratings = [json.loads(row["score_parts"])["judge"] * 9 for row in held_out]
    assert ratings == pytest.approx([round(rating) for rating in ratings])
    told, of_ratings = ([json.loads(row["part_reasons"])["judge"] for row in found] for found in (rows, held_out))
    assert {len(reason.splitlines()) for reason in told} == {2}, "one for each other candidate"
    assert all(reason.startswith('A is this answer, B "') for reason in told)
    assert all(re.fullmatch(r"It has \d+ good words\.", reason) for reason in of_ratings)
    first, second = ({(row["prompt_id"], row["text"]) for row in evaluated} for evaluated in (before, held_out))
    assert SECRET not in finished.logs and "judge judge-1: " in finished.logs
    report = json.loads((rounds / "0001/report.json").read_text())
    items, comparisons, requests = (report["scoring"][f"judge/{name}"] for name in ("items", "comparisons", "requests"))
    assert (items, comparisons, requests) == (12, 12, 24 + 1 + 2 * len(QUESTIONS)), "its canaries before them"
    # Six questions for each prompt and two evaluations of two, without repetitions: the second start asks none again.
    mine = [asked for asked in finished.asked if "Write <b onclick" in asked.user]
    assert len(mine) == 4 * 6 + len(first | second)


def test_it_trains_on_what_people_said(finished: Finished) -> None:
    asked = re.findall(r"^waiting for people: (\d+) of (\d+) questions have no answer yet; ", finished.output, re.M)
    directory = open_run(finished.folder / "runs/quiet")
    said = ReviewRecord(directory.path).said()
    assert asked == [(str(len(said.answers)),) * 2] and said.answers
    candidates, scores = read_candidates(directory.round(1) / "candidates.parquet")
    keys = [(found.prompt_id, zlib.crc32(found.text.encode())) for found in candidates]
    for (prompt, key), score in zip(keys, scores, strict=True):
        others = [other for own, other in keys if own == prompt and other != key]
        assert not others or score.parts["people"] == fmean(key > other for other in others)
    rows = pq.read_table(directory.round(1) / "preferences.parquet").to_pylist()
    assert rows and all(len(set(row["scores"])) > 1 for row in rows)
    assert campaign_record(finished.folder / "runs").info.status == "FINISHED"
