"""A composition of several kinds of scorers in a scorer actor, on real Ray."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.scorer.client import ACTOR, ScorerActor, ScorerClient
from actors.supervision.incidents import Incidents
from actors.supervision.slot import Supervision
from raylign.config import parse_config
from raylign.config.blocks import RecoveryBlock
from raylign.errors import ScorerError
from raylign.records import Candidate, Prompt, Score
from tests.integration.tiny import START_S
from tests.loopback import Posted
from tests.reward_services import Answer, running


def halves(posted: Posted) -> Answer:
    return Answer({"scores": [0.5] * len(posted.body["completions"])})


def test_correct_first_then_good(resources: Mapping[str, float], tmp_path: Path) -> None:
    prompt = Prompt("p", ({"role": "user", "content": "1 + 2?"},), (1,), {"answer": "3"})
    texts = ["It is 3.", "It is 4.", "$\\frac{6}{2}$"]
    candidates = [Candidate("p", i, (1,), (0.0,), text, "stop", 0, 0) for i, text in enumerate(texts)]
    handles: list[ActorHandle[Any]] = []
    with running(halves) as service:
        scorers = {
            "service": {"type": "http", "url": service.url},
            "tone": {"type": "function", "function": "raylign.scoring.vader:compound"},
        }
        good = {"type": "weighted", "scorers": scorers, "weights": {"service": 2.0, "tone": 1.0}}
        block = parse_config({"scoring": {"type": "gate", "gate": {"type": "verifier"}, "score": good}}).scoring

        def spawn() -> ActorHandle[Any]:
            handles.append(ScorerActor.remote(block, str(tmp_path / "scores.sqlite"), str(tmp_path / "stacks"), ACTOR))
            return handles[-1]

        incidents = Incidents(RecoveryBlock(), lambda *entry: None)
        supervision = Supervision("scorer", ScorerError, incidents, tmp_path / "stacks")
        client = ScorerClient(spawn, block, supervision, start_timeout_s=START_S)
        try:
            first, taken = client.score([prompt], candidates), client.metrics()
            again, kept = client.score([prompt], candidates), client.metrics()
        finally:
            ray.kill(handles[0])
    parts = {"gate": 1.0, "score": 1.0, "score/service": 0.5, "score/tone": 0.0}
    assert first == [Score(1.0, parts), Score(-1.0, {"gate": 0.0}), Score(1.0, parts)]
    assert again == first and len(service.asked) == 1
    assert (taken["gate/items"], taken["score/service/items"], taken["score/service/requests"]) == (3, 2, 1)
    assert (kept["gate/cache_hits"], kept["score/tone/cache_hits"], kept["score/tone/items"]) == (3, 2, 0)
