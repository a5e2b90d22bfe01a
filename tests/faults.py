"""What fault tests saw, and the table of it: `python -m tests.faults` writes tests/README.md.

A fault test has the marker `fault` (it runs in `make test`) or `long_fault` (over a minute: `make test-faults`) and
calls `record` once. Rows wait in .cache/faults, one file a test, until the table is made.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / ".cache/faults"
README = ROOT / "tests/README.md"
_LISTED = 4
START, END = "<!-- fault table: python -m tests.faults -->", "<!-- end of the fault table -->"


@dataclass(frozen=True, slots=True)
class FaultRow:
    """One line of the table. Seconds as measured by the test; None: refused or handled where it happens, at once."""

    fault: str
    injected: str
    detected_s: float | None
    recovered_s: float | None
    lost: str
    test: str


def record(
    fault: str, injected: str, *, detected_s: float | None = None, recovered_s: float | None = None, lost: str
) -> None:
    """Keep the row of the running test. `lost` says what the fault cost, "nothing" at best."""
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    ROWS.mkdir(parents=True, exist_ok=True)
    row = FaultRow(fault, injected, detected_s, recovered_s, lost, test)
    (ROWS / f"{re.sub(r'[^A-Za-z0-9]+', '-', test)}.json").write_text(json.dumps(asdict(row)))


def table(rows: list[FaultRow]) -> str:
    """Rows by test as Markdown; what the cases of one test have in common is one row."""
    lines = ["| fault | injected by | detected in | recovered in | lost | test |", "|---|---|---|---|---|---|"]
    cases: dict[tuple[str, str, str], list[FaultRow]] = {}
    for row in sorted(rows, key=lambda row: row.test):
        cases.setdefault((row.test.partition("[")[0], row.fault, row.lost), []).append(row)
    for (function, fault, lost), alike in cases.items():
        name = (alike[0].test if len(alike) == 1 else function).removeprefix("tests/")
        test = f"`{name}`" if len(alike) == 1 else f"`{name}`, {len(alike)} cases"
        times = (_slowest(row.detected_s for row in alike), _slowest(row.recovered_s for row in alike))
        cells = (fault, _listed(row.injected for row in alike), *times, lost, test)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _listed(texts: Iterable[str]) -> str:
    found = list(dict.fromkeys(texts))
    more = f"; {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return "; ".join(found[:_LISTED]) + more


def _slowest(seconds: Iterable[float | None]) -> str:
    measured = [value for value in seconds if value is not None]
    return f"{max(measured):.1f} s" if measured else "at once"


def main() -> None:
    """Replace the table between the two marks."""
    rows = [FaultRow(**json.loads(path.read_text())) for path in ROWS.glob("*.json")]
    before, _, rest = README.read_text().partition(START)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{START}\n\n{table(rows)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
