"""How a private cluster is started on a machine that is busy."""

from typing import Any

import pytest

from actors import cluster
from raylign.errors import PlacementError

LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


def starts(monkeypatch: pytest.MonkeyPatch, failures: list[Exception]) -> list[dict[str, Any]]:
    """`ray.init` fails so often; what it was asked."""
    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        asked.append(options)
        if failures:
            raise failures.pop(0)

    monkeypatch.setattr("ray.init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return asked


def test_a_node_that_is_slow_to_start_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = starts(monkeypatch, [Exception(LATE), Exception(LATE)])
    cluster._join(num_cpus=2)
    assert len(asked) == 3 and all(one == asked[0] for one in asked)


def test_a_node_that_never_starts_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = starts(monkeypatch, [Exception(LATE)] * 9)
    with pytest.raises(PlacementError, match=r"Ray cannot start on this machine .*timed out.*too busy"):
        cluster._join(num_cpus=2)
    assert len(asked) == 4


def test_other_failures_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = starts(monkeypatch, [Exception("no such disk")])
    with pytest.raises(Exception, match="no such disk"):
        cluster._join(num_cpus=2)
    assert len(asked) == 1
