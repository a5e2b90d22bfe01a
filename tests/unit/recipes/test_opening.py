"""What is checked before a run, and what is not waited for."""

from pathlib import Path
from threading import Event

import pytest

from raylign.config import load_config
from raylign.errors import ModelError, ScorerError
from recipes import opening
from tests.unit.tiny_policy import save_recipe


def test_a_model_that_is_not_there_is_told_while_a_judge_is_still_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answers = Event(), Event()

    def describe(block: object) -> tuple[str, ...]:
        asked.set()
        answers.wait()
        return ("judge",)

    monkeypatch.setattr(opening, "describe_scorer", describe)
    config = load_config(save_recipe(tmp_path), [f"model.path={tmp_path / 'none'}"])
    try:
        with pytest.raises(ModelError, match="no such folder"), opening.online_run(config):
            pytest.fail("never reached")
        assert asked.wait(60) and not answers.is_set()
    finally:
        answers.set()


def test_a_scorer_that_cannot_be_used_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(block: object) -> tuple[str, ...]:
        raise ScorerError("the judge does not answer")

    monkeypatch.setattr(opening, "describe_scorer", describe)
    config = load_config(save_recipe(tmp_path))
    with pytest.raises(ScorerError, match="does not answer"), opening.online_run(config):
        pytest.fail("never reached")
    assert not (tmp_path / "runs").exists()
