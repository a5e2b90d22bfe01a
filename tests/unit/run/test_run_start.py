"""What a campaign checks before it asks for a cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raylign.config import load_config
from raylign.errors import PromptError, ScorerError
from recipes.opening import online_run
from tests.judges import Judged, Reply, honest
from tests.unit.tiny_policy import save_recipe


class Reached(Exception):
    """All checks are passed."""


@contextmanager
def no_cluster() -> Iterator[None]:
    raise Reached
    yield


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in an empty project whose scorer is in a folder beside it, on the import path."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/foreign_scores.py").write_text("def score(prompts, completions): ...\n")
    (tmp_path / "project").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr("actors.cluster.cluster", no_cluster)
    return save_recipe(tmp_path / "project")


def start(recipe: Path, *settings: str) -> None:
    with online_run(load_config(recipe, ["scoring.function=foreign_scores:score", *settings])):
        raise AssertionError("started without a cluster")


def test_a_scorer_from_outside_needs_to_be_allowed(recipe: Path) -> None:
    with pytest.raises(ScorerError, match="is outside the project"):
        start(recipe)
    with pytest.raises(Reached):
        start(recipe, "scoring.allow_outside=true")


def test_a_judge_is_asked_before_anything_starts(recipe: Path, judged: Judged) -> None:
    _, server = judged(honest)
    settings = f"scoring={{type: judge, base_url: '{server.base_url}', model: m, retries: 0}}"
    with pytest.raises(Reached), online_run(load_config(recipe, [settings])):
        raise AssertionError("started without a cluster")
    assert len(server.asked) == 1
    _, refusing = judged(lambda asked: Reply(status=401))
    with (
        pytest.raises(ScorerError, match="HTTP 401: no key was sent"),
        online_run(load_config(recipe, [settings, f"scoring.base_url={refusing.base_url}"])),
    ):
        raise AssertionError("started without a judge")


def test_a_run_refused_for_its_prompts_has_them_listed_beside_where_it_would_stand(recipe: Path) -> None:
    with (recipe.parent / "prompts.jsonl").open("a") as file:
        file.write("{\n")
    listed = recipe.parent / "runs/tiny.quarantine.jsonl"
    with pytest.raises(PromptError, match=f"every bad row is in {listed}"):
        start(recipe)
    assert listed.is_file() and list(listed.parent.iterdir()) == [listed]
