"""When the writer draws the figures of a run's page anew."""

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from raylign.tracking import writer
from raylign.tracking.feed import FeedState, RoundState
from raylign.tracking.journal import Event

ROUND = {"policy_version": 1, "counts": {}, "train": {}, "sync": {}, "seconds": {}}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each renewal of the page drew."""
    found: list[bool] = []
    monkeypatch.setattr(writer, "present", lambda *_, draw: found.append(draw))
    return found


def feed(folder: Path) -> writer.MlflowWriter:
    state = FeedState(run_id="parent", rounds={1: RoundState(run_id="child")})
    return writer.MlflowWriter(MagicMock(), folder, "", state)


def tell(to: writer.MlflowWriter, name: str, **payload: Any) -> None:
    to.apply(Event(0.0, to.state.sequence + 1, name, payload, Path("journal"), 0))
    to.flush()


def test_figures_come_with_the_first_finished_round(tmp_path: Path, drawn: list[bool]) -> None:
    told = feed(tmp_path)
    tell(told, "evaluation", round=0, evaluation={"score": 0.5}, capability={})
    tell(told, "round_finished", round=1, evaluation={"score": 0.6}, capability={}, **ROUND)
    tell(told, "campaign_finished", status="FINISHED")
    assert drawn == [False, True, False], "nothing is new at the end"


def test_the_end_of_a_run_without_a_round_has_figures(tmp_path: Path, drawn: list[bool]) -> None:
    told = feed(tmp_path)
    tell(told, "evaluation", round=0, evaluation={"score": 0.5}, capability={})
    tell(told, "campaign_finished", status="FAILED")
    assert drawn == [False, True]
