"""Fixtures of several unit test modules."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from raylign.config.scoring import JudgeScoringBlock
from raylign.scoring.judge import JudgeScorer
from tests.judges import Judge, Judged, Server, serving


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judged]:
    """Scorers over judges of this process; by default without canaries, and never with long waits."""
    for name, seconds in (("FIRST_WAIT_S", 0.01), ("LONGEST_WAIT_S", 0.02), ("JITTER_S", 0.01)):
        monkeypatch.setattr(f"raylign.scoring.http_client.{name}", seconds)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ExitStack() as stack:

        def make(judge: Judge, **options: Any) -> tuple[JudgeScorer, Server]:
            server = stack.enter_context(serving(judge))
            settings = {"canaries": False, "max_unscored": 1.0, "timeout_s": 60.0} | options
            return JudgeScorer(JudgeScoringBlock(base_url=server.base_url, model="judge-1", **settings)), server

        yield make
