"""Why a scorer gave its value, as the rationale of feedback in MLflow."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.errors import RecordError
from raylign.records import Preference, Score
from raylign.run.tables import write_candidates, write_preferences
from raylign.tracking.feed import TraceFile
from raylign.tracking.trace_rows import Trace
from tests.unit.tracking.test_traces import KEY, candidate, feedback, held_out, prompt, state, traces_of


def rationales(trace: Trace) -> dict[str, str | None]:
    return {own.name: own.rationale for own in feedback(trace)}


def test_reasons_stand_beside_the_scores_they_are_for_also_of_earlier_tables(tmp_path: Path) -> None:
    parts = {"quality": 0.75, "quality/rating": 7.0, "brevity": -0.25}
    told = {"quality": f"kind, {KEY}\x00", "quality/rating": "seven", "gone": "no value"}
    file = held_out(
        tmp_path, [prompt(0), prompt(1)], ["yes", "no"], [Score(0.5, parts, "", told), Score(0.5, {}, "fair")]
    )
    first, second = traces_of(tmp_path, file, state())
    assert rationales(first) == {
        "score": None,
        "score.quality": "kind, [redacted]\N{REPLACEMENT CHARACTER}",
        "score.quality.rating": "seven",
        "score.brevity": None,
    }
    assert rationales(second) == {"score": "fair"} and feedback(second)[0].value == 0.5
    path = tmp_path / file.path
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["part_reasons"]), path)
    assert set(rationales(traces_of(tmp_path, file, state())[0]).values()) == {None}
    for wrong in ("[7]", '{"quality": 7}', "{"):
        changed = table.set_column(table.column_names.index("part_reasons"), "part_reasons", pa.array([wrong, None]))
        pq.write_table(changed, path)
        with pytest.raises(RecordError, match=r"samples\.parquet"):
            traces_of(tmp_path, file, state())


def test_a_preference_has_the_reasons_of_both_its_ends(tmp_path: Path) -> None:
    """A judge alone speaks for the whole, a member for its part; tables of one round may be of two versions."""
    prompts = [prompt(number) for number in range(2)]
    groups = [(candidate(own, 0, "good"), candidate(own, 1, "bad")) for own in prompts]
    write_preferences(
        tmp_path / "preferences.parquet",
        [Preference(own, group, (0.9, 0.2), (1.0,) * 2) for own, group in zip(prompts, groups, strict=True)],
    )
    judged = [Score(0.9, {}, "A wins\nand again"), Score(0.2, {}, "B wins")]
    composed = [
        Score(0.9, {"quality": 1.0}, "", {"quality": "kind"}),
        Score(0.2, {"quality": 0.0}, "", {"quality": "rude"}),
    ]
    for number, scored in enumerate((judged, composed)):
        write_candidates(tmp_path / f"candidates{'-1' * number}.parquet", [prompts[number]], groups[number], scored)
    path = tmp_path / "candidates.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["part_reasons"]), path)
    file = TraceFile(kind="preferences", path="preferences.parquet", round=1, time_ms=10**12)
    alone, member = traces_of(tmp_path, file, state(1.0))
    assert rationales(alone) == {
        "training.margin": None,
        "training.chosen": "A wins\n\nand again",
        "training.rejected": "B wins",
    }
    assert rationales(member) == {
        "training.margin": None,
        "training.chosen": None,
        "training.chosen.quality": "kind",
        "training.rejected": None,
        "training.rejected.quality": "rude",
    }
