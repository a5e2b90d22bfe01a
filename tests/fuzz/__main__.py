"""Fuzzes every format in turn, with new inputs each time: `python -m tests.fuzz --minutes 60`.

Prints a line a format and turn, and at the end a table.

Inputs that break a reader are made small and kept in `tests/fuzz/cases/FORMAT/`, which every later turn tries first.
With `--examples` there is one turn of as many inputs a format, the same each time; `make test` has such a turn.
"""

import argparse
import hashlib
import logging
import sys
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import Flaky

from tests.fuzz.formats import FORMATS, Format
from tests.fuzz.guard import Defect, limited_memory, read

CASES = Path(__file__).parent / "cases"
PER_TURN = 100


def turn(found: Format, number: int, examples: int, counts: Counter[str]) -> tuple[bytes, str] | None:
    """The smallest input that breaks the reader, with what it does, if one of `examples` does."""
    last: dict[str, tuple[bytes, str]] = {}

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
    )
    @given(found.inputs())
    def one(data: bytes) -> None:
        counts["inputs"] += 1
        try:
            counts["taken"] += read(found.reader, data)
        except Defect as defect:
            last["input"] = (data, str(defect))
            raise

    try:
        one()
    except (Defect, Flaky):
        return last["input"]
    return None


def keep(name: str, data: bytes) -> Path:
    """The file of this input among the cases of its format."""
    path = CASES / name / hashlib.sha256(data).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def known(name: str) -> tuple[bytes, str] | None:
    """A kept input that breaks the reader, or the valid one if that is not taken."""
    valid = FORMATS[name].valid()
    for data in (valid, *(path.read_bytes() for path in sorted((CASES / name).glob("*")))):
        try:
            taken = read(FORMATS[name].reader, data)
        except Defect as defect:
            return data, str(defect)
        if data is valid and not taken:
            return data, "what is valid is refused"
    return None


def _told(name: str, found: Counter[str], began: float) -> str:
    seconds = time.process_time() - began
    return f"{name}: {found['inputs']:,} inputs, {found['taken']:,} taken, {seconds:.1f} CPU s"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--examples", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("formats", nargs="*", help="all by default")
    asked = parser.parse_args()
    names = asked.formats or list(FORMATS)
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    number, end = asked.seed, time.monotonic() + 60 * asked.minutes
    defects: set[bytes] = set()
    logging.disable(logging.CRITICAL)
    with limited_memory():
        while not counts[names[-1]] or (not asked.examples and time.monotonic() < end):
            for name in names:
                began = time.process_time()
                examples = max(1, (asked.examples or PER_TURN) // FORMATS[name].cost)
                broken = known(name) or turn(FORMATS[name], number, examples, counts[name])
                print(f"turn {number - asked.seed + 1}, {_told(name, counts[name], began)}", flush=True)
                if broken and broken[0] not in defects:
                    defects.add(broken[0])
                    counts[name]["defects"] += 1
                    print(f"{name}, seed {number}: {broken[1]}\n  {keep(name, broken[0])}", flush=True)
            number += 1
            tried = sum(found["inputs"] for found in counts.values())
            left = max(0.0, end - time.monotonic()) / 60
            print(f"turn {number - asked.seed}: {tried:,} inputs, {left:.0f} minutes left", flush=True)
    print(f"{'format':34} {'inputs':>9} {'taken':>9} {'defects':>8}")
    for name, found in counts.items():
        print(f"{name:34} {found['inputs']:9,} {found['taken']:9,} {found['defects']:8,}")
    return int(any(found["defects"] for found in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
