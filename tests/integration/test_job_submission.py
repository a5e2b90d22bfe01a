"""The recipe as a Ray job: only the uploaded folder and the installed packages are on the cluster.

One whole run begins on this machine, with secrets in its environment, waits for people, and goes on as a job.
"""

import json
import os
import re
import secrets
import zlib
from collections import defaultdict
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from statistics import fmean

import httpx
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from raylign.review.record import ReviewRecord
from raylign.run.directory import open_run
from raylign.run.tables import read_candidates
from raylign.scoring.judge_client import QUESTIONS
from raylign.tracking.journal import read_events
from recipes.commands.cli import app
from tests.faults import record
from tests.integration import secret_run
from tests.integration.job_cluster import (
    OUTPUTS,
    PACKAGES,
    RUNTIME_ENV,
    Cluster,
    copy_sources,
    files,
    holders,
    imported,
    started,
)
from tests.integration.secret_run import (
    OF_NODES,
    PICKLE_STARTS,
    PICKLED,
    SECRET,
    Elements,
    Finished,
    finished_run,
)
from tests.integration.tiny import (
    LONG_TRAINING,
    RECIPE,
    SMALLEST,
    START_S,
    campaign_record,
    foreign_lines,
    synced_record,
    wait_until,
    weight_folders,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

SMALL_MB = 3.0
STOP_S = 400.0
NOT_OURS = re.compile(r"imported \w+ from |[\d:, -]+\tINFO job_manager\.py:|Running entrypoint for job raysubmit_")
"""What the copy of the sources says, and Ray's own two lines at the top of a job's log."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("copy")
    copy_sources(copy)
    return copy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of one node, with secrets in the environment of the node."""
    with started(tmp_path_factory.mktemp("head"), OF_NODES) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def finished(cluster: Cluster, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    with finished_run(cluster, checkout, tmp_path_factory.mktemp("quiet")) as found:
        yield found


@pytest.mark.fault
def test_without_the_token_nothing_is_submitted(cluster: Cluster, checkout: Path, tmp_path: Path) -> None:
    assert httpx.get(f"{cluster.dashboard}/api/jobs/").status_code == HTTPStatus.UNAUTHORIZED
    (tmp_path / "other").write_text("f" * 64)
    for extra, given in (
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token and got none; "),
        ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}, "asks for a token and got another; "),
        ({"RAY_AUTH_TOKEN_PATH": "", "HOME": str(tmp_path)}, "RAY_AUTH_MODE=token, but there is no token; "),
    ):
        done = cluster.submit(RECIPE, *SMALLEST, f"run.dir={tmp_path}", cwd=checkout, **extra)
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


def test_a_job_runs_on_its_snapshot_alone_and_again(cluster: Cluster, checkout: Path, finished: Finished) -> None:
    output, log = finished.submitted, finished.job_log
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

    uploaded = {path for path in snapshot.rglob("*") if path.is_file()}
    assert [output for output in OUTPUTS if snapshot / output in uploaded] == []
    megabytes = sum(path.stat().st_size for path in uploaded if path.suffix != ".pyc") / 1e6
    print(f"snapshot: {len(uploaded)} files, {megabytes:.2f} MB")
    assert megabytes < SMALL_MB

    directory = open_run(finished.run)
    (report,) = directory.reports()
    preferences = pq.read_table(directory.round(1) / "preferences.parquet")
    assert report.counts["preferences"] == preferences.num_rows > 0
    assert (directory.checkpoint(1) / "adapter_model.safetensors").is_file()
    assert campaign_record(finished.run.parent).info.status == "FINISHED"
    assert "round 1 train 4/4 steps in " in output
    assert re.search(r"^round 1: held-out score ", output, re.MULTILINE)
    assert not set("\x1b\r\b") & set(log)
    assert "Traceback" not in log
    assert weight_folders(finished.name) == []

    again = cluster.submit(secret_run.RECIPE, *finished.settings, cwd=checkout)
    assert (again.returncode, "all 1 rounds are done" in again.stdout) == (0, True), again.stdout


@pytest.mark.fault
def test_a_run_keeps_secrets_to_itself_and_hostile_prompts_stay_data(cluster: Cluster, finished: Finished) -> None:
    folder, lines = finished.folder, finished.seen.lines
    assert any("raylet" in line for line in lines), "the watch saw the processes"
    environments = finished.seen.environments.items()
    drivers = [environment for line, environment in environments if "recipes.commands.cli" in line]
    scoring = [environment for line, environment in environments if "recipes.commands.cli" not in line]
    had = {environment.count(SECRET.encode()) for environment in drivers}
    assert had == {9, 10}, "both drivers had them, one that of its private cluster too"
    assert SECRET not in finished.begun + finished.submitted + finished.job_log
    assert [line for line in lines if SECRET in line] == []
    assert scoring and all(b"PATH=" in environment for environment in scoring)
    assert not any(SECRET.encode() in environment for environment in scoring)
    assert holders(folder, SECRET) == holders(finished.ray_folder, SECRET) == cluster.holders_of(SECRET) == []
    assert any("mlflow.db" in path.name for path in files(folder))

    run_directory = finished.run
    assert [path for path in files(run_directory) if path.suffix in PICKLED] == []
    assert [path for path in files(run_directory) if path.read_bytes()[:4].startswith(PICKLE_STARTS)] == []

    made = {path.relative_to(folder).parts[:2] for path in set(files(folder)) - finished.before}
    made_in_runs = {parts[1] for parts in made if parts[0] == "runs"}
    assert {parts[0] for parts in made if parts[0] != "runs" and not parts[0].startswith("output-")} <= {"__pycache__"}
    assert made_in_runs <= {finished.name, "mlflow.db", "mlartifacts", ".mlflow.db.lock"}
    pages = [path for path in files(folder / "runs/mlartifacts") if path.suffix == ".html"]
    assert any("onclick" in page.read_text() for page in pages), "MLflow has pages of the tables"
    assert all(Elements(page.read_text()).found.isdisjoint({"b", "script"}) for page in pages)
    record("secrets and hostile prompts in a run", "ten secrets, path-like ids, HTML", lost="nothing")


def test_the_recipe_trains_groups_and_says_what_trl_would(finished: Finished) -> None:
    """Real engines: the ratios of a round's first step are 1, and the generator's log-probs are the trainer's."""
    assert foreign_lines(finished.begun) == []
    job_lines = "\n".join(line for line in finished.job_log.splitlines() if not NOT_OURS.match(line))
    assert foreign_lines(job_lines) == []
    directory = open_run(finished.run)
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
    rounds = finished.run / "rounds"
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
    asked = re.findall(
        r"^waiting for people: (\d+) of (\d+) questions have no answer yet; ", finished.begun + finished.job_log, re.M
    )
    directory = open_run(finished.run)
    said = ReviewRecord(directory.path).said()
    assert asked == [(str(len(said.answers)),) * 2] and said.answers
    candidates, scores = read_candidates(directory.round(1) / "candidates.parquet")
    keys = [(found.prompt_id, zlib.crc32(found.text.encode())) for found in candidates]
    for (prompt, key), score in zip(keys, scores, strict=True):
        others = [other for own, other in keys if own == prompt and other != key]
        assert not others or score.parts["people"] == fmean(key > other for other in others)
    rows = pq.read_table(directory.round(1) / "preferences.parquet").to_pylist()
    assert rows and all(len(set(row["scores"])) > 1 for row in rows)
    assert campaign_record(finished.run.parent).info.status == "FINISHED"


def test_the_status_of_a_job_is_that_of_its_submission(cluster: Cluster, checkout: Path, tmp_path: Path) -> None:
    done = cluster.submit(RECIPE, *SMALLEST, f"run.dir={tmp_path}", "prompts.source=/none.jsonl", cwd=checkout)
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
