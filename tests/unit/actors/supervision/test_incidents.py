"""Losses of actors: their record, their count and their cap."""

from collections.abc import Mapping
from typing import Any

import pytest

from actors.supervision.endings import Loss
from actors.supervision.incidents import Happened, Incidents
from raylign.config.blocks import RecoveryBlock
from raylign.errors import GeneratorError

KILLED = Loss("process", "killed")
Seen = list[tuple[str, Happened, Mapping[str, Any]]]


def incidents(seen: Seen, **options: float) -> Incidents:
    return Incidents(RecoveryBlock.model_validate(options), lambda *entry: seen.append(entry))


def test_a_loss_and_its_recovery_are_on_record() -> None:
    seen: Seen = []
    log = incidents(seen)
    log.begin_round(3)
    log.lost("generator", "generator-0", KILLED, GeneratorError)
    log.recovered("generator", "generator-0")
    assert [(role, happened) for role, happened, _ in seen] == [("generator", "lost"), ("generator", "recovered")]
    assert seen[0][2] == {"actor": "generator-0", "cause": "killed", "kind": "process", "round": 3, "count": 1}
    assert 0 <= seen[1][2]["seconds"] < 1


def test_one_loss_past_the_cap_stops_the_run() -> None:
    seen: Seen = []
    log = incidents(seen, max_restarts=2)
    for _ in range(2):
        log.lost("generator", "generator-0", KILLED, GeneratorError)
    with pytest.raises(GeneratorError, match=r"loss number 3 within 3600 s, and recovery.max_restarts=2"):
        log.lost("scorer", "scorer-0", KILLED, GeneratorError)
    assert len(seen) == 3


def test_old_losses_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("actors.supervision.incidents.time.monotonic", lambda: now[0])
    log = incidents([], max_restarts=1, window_s=10)
    for moment in (0.0, 11.0, 22.0):
        now[0] = moment
        log.lost("generator", "generator-0", KILLED, GeneratorError)
