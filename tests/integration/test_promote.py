"""`raylign promote` against a real MLflow database and server: refused, then the aliases move, and nothing twice."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner, Result

from raylign.errors import NotPromoted
from raylign.run.directory import RunDirectory
from raylign.tracking.feed import FeedState, load_state, save_state
from raylign.tracking.journal import JOURNAL_NAME, Journal
from raylign.tracking.registry import CHAMPION, PROMOTING, UNTIL, Registry, policies_of
from recipes.commands.cli import app
from tests.integration.played_runs import evaluation, open_run, start
from tests.mlflow_servers import free_port, mlflow_server, put_database
from tests.promoted import add_round, evaluate, held_out, new_run, offline_run, run_config, save_answers

MODEL = "family"
WON, TIED = [1.0] * 20, [0.0] * 20


@pytest.fixture(scope="module", params=["database", "server"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp(str(request.param))
    if request.param == "database":
        yield put_database(folder / "mlflow.db")
    else:
        with mlflow_server(folder, free_port()) as uri:
            yield uri


def promote(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["promote", *map(str, arguments)])


def played(parent: Path, uri: str, name: str, model: str, **blocks: Any) -> RunDirectory:
    """A run in MLflow, before its first round."""
    tracking = {"uri": uri, "experiment": "tests", "registered_model": model}
    config = run_config(parent, name, tracking=tracking, **blocks)
    directory = new_run(config)
    tracker = open_run(directory.path, uri)
    start(tracker, directory.path, config)
    assert tracker.close("FINISHED", timeout_s=600) == 0
    save_answers(directory.round(0) / "samples.parquet", held_out(20), TIED)
    directory.write_baseline(evaluation(0.1))
    return directory


def found(uri: str, model: str) -> tuple[dict[str, int], dict[int, dict[str, str]]]:
    registry = Registry(uri, model)
    return registry.aliases(), {one.number: dict(one.tags) for one in registry.versions()}


def test_refused_then_moved_and_nothing_twice(store: str, tmp_path: Path) -> None:
    run = played(tmp_path, store, "first", MODEL)
    add_round(run, 1, TIED)
    add_round(run, 2, TIED, score=0.25, win_rate=0.5)
    refused = promote(run.path)
    assert refused.exit_code == 1 and "win rate: 0.500 [" in refused.output, refused.output
    assert "is not above 0.5" in refused.output and "--force REASON" in refused.output
    aliases, versions = found(store, MODEL)
    assert aliases == {"candidate": 2} and [own["raylign.version"] for own in versions.values()] == ["1", "2"]
    assert (versions[2]["score"], versions[2]["win_rate"], versions[2]["round"]) == ("0.250", "0.500", "2")

    add_round(run, 3, WON)
    done = promote(run.path)
    assert done.exit_code == 0 and "models:/family@champion, version 3 there" in done.output, done.output
    after = found(store, MODEL)
    assert after[0] == {"candidate": 3, "champion": 3} and after[1][3]["gate"] == "passed"
    again = promote(run.path)
    assert again.exit_code == 0 and "0 of 3 versions are new" in again.output and "champion already" in again.output
    assert found(store, MODEL) == after

    add_round(run, 4, [2.0] * 20)
    refused = promote(run.path, "--above", "0.99")
    assert refused.exit_code == 1 and f"over the champion, version 3 of {run.path}" in " ".join(refused.output.split())
    assert promote(run.path).exit_code == 0
    aliases, versions = found(store, MODEL)
    assert aliases == {"candidate": 4, "champion": 4}
    assert UNTIL in versions[3] and UNTIL not in versions[4] and "champion_since" in versions[3]

    back = promote(run.path, "--version", "3", "--force", "version 4 fails in production")
    assert back.exit_code == 0, back.output
    aliases, versions = found(store, MODEL)
    assert aliases == {"candidate": 4, "champion": 3}
    assert versions[3]["forced"] == "version 4 fails in production" and UNTIL not in versions[3]
    assert UNTIL in versions[4] and versions[3]["gate"] == "refused by unused prompts"


def test_the_champion_leads_to_its_checkpoint(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = played(tmp_path, store, "leads", "leads")
    add_round(run, 1, WON)
    assert promote(run.path).exit_code == 0
    version = MlflowClient(store).get_model_version_by_alias("leads", "champion")
    assert version.run_id is not None and str(version.source).startswith(f"runs:/{version.run_id}/policies/0001-")
    assert MlflowClient(store).get_run(version.run_id).info.run_name == "leads"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    folder = download_artifacts(artifact_uri="models:/leads@champion", dst_path=str(tmp_path))
    policy = json.loads((Path(folder) / "policy.json").read_text())
    assert os.path.samefile(policy["checkpoint"], run.checkpoint(1)) and policy["version"] == 1
    assert policy["export"].startswith(f"raylign export {run.path} --version 1")


def test_another_run_of_the_family_needs_an_evaluation_against_the_champion(store: str, tmp_path: Path) -> None:
    old = played(tmp_path, store, "old", "rivals")
    add_round(old, 1, WON)
    assert promote(old.path).exit_code == 0
    run = played(tmp_path, store, "new", "rivals", evaluation={"metric_for_best_model": "score"})
    add_round(run, 1, WON, score=0.5)
    refused = promote(run.path, "--version", "best")
    assert refused.exit_code == 1 and "evaluation.metric_for_best_model=score" in refused.output, refused.output
    questions = [f"Never asked {number}?" for number in range(20)]
    sides = f"version 1 of {run.path}", f"version 1 of {old.path}"
    lost = evaluate(tmp_path, *sides, questions, 9, run.checkpoint(1))
    assert promote(run.path, "--evaluation", lost).exit_code == 1
    won = evaluate(tmp_path, *sides, questions, 18, run.checkpoint(1))
    done = promote(run.path, "--version", "best", "--evaluation", won)
    assert done.exit_code == 0 and "by gold" in done.output, done.output
    aliases, versions = found(store, "rivals")
    assert aliases == {"candidate": 2, "champion": 2} and UNTIL in versions[1]
    assert versions[2]["gate.win_rate"] == "0.9"


def test_a_run_on_a_data_set_is_promoted_by_an_evaluation(tmp_path: Path) -> None:
    uri = put_database(tmp_path / "mlflow.db")
    rows = [{"prompt": f"Asked {number}?", "chosen": "Yes.", "rejected": "No."} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config, run = offline_run(tmp_path, tracking={"uri": uri, "experiment": "tests"})
    tracker = open_run(run.path, uri)
    tracker.run_started(config, {})
    assert tracker.close("FINISHED", timeout_s=600) == 0
    refused = promote(run.path)
    assert refused.exit_code == 1 and "which has no win rate" in " ".join(refused.output.split()), refused.output
    sides = f"version 1 of {run.path}", f"version 0 of {run.path}"
    questions = [f"Never asked {number}?" for number in range(20)]
    known = promote(
        run.path, "--evaluation", evaluate(tmp_path, *sides, [*questions, "asked 2?"], 21, run.checkpoint(1))
    )
    assert known.exit_code == 1 and "1 of its prompts were asked by the run too" in " ".join(known.output.split())
    won = evaluate(tmp_path, *sides, questions, 18, run.checkpoint(1))
    done = promote(run.path, "--evaluation", won)
    assert done.exit_code == 0 and found(uri, "offline")[0] == {"candidate": 1, "champion": 1}, done.output


class Interrupted(Registry):
    """Does something before it moves the champion."""

    def __init__(self, uri: str, name: str, meanwhile: Callable[[], None]) -> None:
        super().__init__(uri, name)
        self._meanwhile = meanwhile

    def _point(self, alias: str, number: int) -> None:
        if alias == CHAMPION:
            self._meanwhile()
        super()._point(alias, number)


def test_two_at_once_do_not_both_move_the_champion(tmp_path: Path) -> None:
    uri = put_database(tmp_path / "mlflow.db")
    run = played(tmp_path, uri, "twice", "twice")
    add_round(run, 1, WON)
    add_round(run, 2, [2.0] * 20)
    first, second = policies_of(run, "c")
    registry, refused = Registry(uri, "twice"), list[str]()
    registry.add([first, second], load_state(run.path, uri).run_id)

    def rival() -> None:
        with pytest.raises(NotPromoted) as caught:
            Registry(uri, "twice").promote(second, {}, None)
        refused.append(str(caught.value))

    assert Interrupted(uri, "twice", rival).promote(first, {}, None) == 1
    assert refused == ["another `raylign promote` is making version 1 its champion"]
    assert registry.aliases()["champion"] == 1 and not any(PROMOTING in one.tags for one in registry.versions())
    with pytest.raises(NotPromoted, match="the champion of twice is version 1 by now, not None"):
        registry.promote(second, {}, None)
    client = MlflowClient(uri)
    long_ago = datetime.now(UTC) - timedelta(minutes=2)
    for stale in (long_ago.isoformat(), "no time"):
        client.set_model_version_tag("twice", "1", PROMOTING, stale)
        assert registry.promote(second, {}, registry.aliases()["champion"]) == 2
    assert registry.aliases()["champion"] == 2


def begun(parent: Path, name: str, uri: str) -> RunDirectory:
    """A run with a round, of which MLflow at `uri` has heard nothing yet."""
    directory = new_run(run_config(parent, name, tracking={"uri": uri}))
    add_round(directory, 1, WON)
    with Journal(directory.path / JOURNAL_NAME) as journal:
        journal.append("campaign_started", {"campaign": name})
    return directory


def test_what_cannot_be_registered_is_said(tmp_path: Path) -> None:
    none = promote(new_run(run_config(tmp_path, "none")).path)
    assert none.exit_code == 1 and "no finished round with a checkpoint" in none.output
    run = begun(tmp_path, "unknown", put_database(tmp_path / "other.db"))
    unknown = promote(run.path)
    assert unknown.exit_code == 1 and f"raylign sync {run.path}" in unknown.output, unknown.output
    uri = f"http://127.0.0.1:{free_port()}"
    away = begun(tmp_path, "away", uri)
    save_state(away.path, uri, FeedState(run_id="0" * 32))
    failed = promote(away.path)
    assert failed.exit_code == 1 and "where policies are registered, fails" in failed.output, failed.output
    empty = promote(run.path, "--force", " ")
    assert empty.exit_code == 2 and "give a reason" in empty.output
