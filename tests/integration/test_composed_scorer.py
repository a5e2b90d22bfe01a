"""Compositions of several kinds of scorers in a scorer actor, on real Ray."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.scorer.client import ACTOR, ScorerActor, ScorerClient
from actors.supervision.incidents import Incidents
from actors.supervision.slot import Supervision
from raylign.config import parse_config
from raylign.config.blocks import RecoveryBlock
from raylign.config.scoring import ScoringBlock
from raylign.errors import ScorerError
from raylign.records import Candidate, Prompt, Score
from raylign.scoring.composition import PEOPLE
from tests.integration.tiny import START_S
from tests.loopback import Posted
from tests.reward_services import Answer, running


def halves(posted: Posted) -> Answer:
    return Answer({"scores": [0.5] * len(posted.body["completions"])})


@contextmanager
def client_of(block: ScoringBlock, folder: Path) -> Iterator[ScorerClient]:
    handles: list[ActorHandle[Any]] = []

    def spawn() -> ActorHandle[Any]:
        handles.append(ScorerActor.remote(block, str(folder / "scores.sqlite"), str(folder / "stacks"), ACTOR))
        return handles[-1]

    incidents = Incidents(RecoveryBlock(), lambda *entry: None)
    supervision = Supervision("scorer", ScorerError, incidents, folder / "stacks")
    client = ScorerClient(spawn, block, supervision, start_timeout_s=START_S)
    try:
        yield client
    finally:
        ray.kill(handles[0])


def test_correct_first_then_good_and_people_beside_it(resources: Mapping[str, float], tmp_path: Path) -> None:
    """People are asked about all candidates but the last; what nobody was asked about has the held-out scorer."""
    prompt = Prompt("p", ({"role": "user", "content": "1 + 2?"},), (1,), {"answer": "3"})
    texts = ["It is 3.", "It is 4.", "$\\frac{6}{2}$"]
    asked = replace(prompt, meta={**prompt.meta, PEOPLE: {texts[0]: 1.0, texts[1]: 0.0}})
    candidates = [Candidate("p", i, (1,), (0.0,), text, "stop", 0, 0) for i, text in enumerate(texts)]
    with running(halves) as service:
        tone = {"type": "function", "function": "raylign.scoring.vader:compound"}
        scorers = {"service": {"type": "http", "url": service.url}, "tone": tone}
        good = {"type": "weighted", "scorers": scorers, "weights": {"service": 2.0, "tone": 1.0}}
        both = {
            "all": {"type": "gate", "gate": {"type": "verifier"}, "score": good},
            "people": {"type": "human", "held_out": {"type": "verifier"}},
        }
        tree = {"type": "weighted", "scorers": both, "weights": {"all": 1.0, "people": 10.0}, "max_unscored": 0.5}
        block = parse_config({"scoring": tree}).scoring
        with client_of(block, tmp_path) as client:
            first, taken = client.score([prompt], candidates), client.metrics()
            again, kept = client.score([asked], candidates), client.metrics()
    parts = {"all": 1.0, "all/gate": 1.0, "all/score": 1.0, "all/score/service": 0.5, "all/score/tone": 0.0}
    wrong = {"all": -1.0, "all/gate": 0.0}
    assert first == [
        Score(11.0, {**parts, "people": 1.0}),
        Score(-1.0, {**wrong, "people": 0.0}),
        Score(11.0, {**parts, "people": 1.0}),
    ]
    assert again == [
        Score(11.0, {**parts, "people": 1.0}),
        Score(-1.0, {**wrong, "people": 0.0}),
        Score(None, parts, "people: people compared it with no other answer"),
    ]
    assert len(service.asked) == 1
    names = ("all/gate/items", "all/score/service/items", "all/score/service/requests")
    assert [taken[name] for name in names] == [3, 2, 1]
    assert (kept["all/gate/cache_hits"], kept["all/score/tone/cache_hits"], kept["all/score/tone/items"]) == (3, 2, 0)
    assert (taken["people/held_out/cache_hits"], kept["people/held_out/cache_hits"]) == (3, 0), "the gate's, and none"
