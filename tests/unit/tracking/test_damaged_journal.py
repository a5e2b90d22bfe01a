"""A journal with a damaged line on its way to MLflow: said with path, line and cure, never a raw error."""

from pathlib import Path
from typing import Any

import pytest

from raylign.errors import RecordError
from tests.faults import record
from tests.fuzz.journal import events, reader, written

ENVELOPE = {"time", "sequence", "event"}
OPTIONAL = {"scoring", "capability", "traces", "ended", "non_finite"}
UNREAD = {("artifact", "sha256")}
"""Read of the preferences alone."""


def complaint(folder: Path, found: list[dict[str, Any]]) -> RecordError:
    with pytest.raises(RecordError) as caught:
        reader(lambda: folder)(written(found))
    return caught.value


@pytest.mark.fault
def test_whatever_an_event_lacks_is_named_with_its_line(tmp_path: Path) -> None:
    whole, tried = events(), 0
    reader(lambda: tmp_path)(written(whole))
    kinds = {event["event"]: number for number, event in enumerate(whole)}
    for kind, number in kinds.items():
        for key in whole[number].keys() - ENVELOPE:
            changes: list[dict[str, Any]] = [{**whole[number], key: [[None]]}]
            if key not in OPTIONAL:
                changes.append({name: value for name, value in whole[number].items() if name != key})
            if (kind, key) in UNREAD:
                continue
            for change in changes:
                error = complaint(tmp_path, [*whole[:number], change, *whole[number + 1 :]])
                assert f"{tmp_path}/journal/events.jsonl: line {number + 1}: event {number + 1} ({kind})" in str(error)
                assert repr(key) in str(error) and error.cure == "restore events.jsonl from a copy"
                tried += 1
    assert len(kinds) >= 8 and tried > 40, (kinds, tried)
    record("a damaged line of the journal, sync", f"{tried} fields lost or retyped", lost="nothing: line and cure")


def test_an_event_out_of_its_order_or_of_a_newer_raylign_is_named(tmp_path: Path) -> None:
    whole = events()
    first = {**whole[-2], "sequence": 1}
    assert "line 1: event 1 (incident) of events.jsonl comes before campaign_started" in str(
        complaint(tmp_path, [first])
    )
    error = complaint(tmp_path, [{**first, "event": "later"}])
    assert "event 1 (later) of events.jsonl is unknown here" in str(error) and "newer" in error.cure
