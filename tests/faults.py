"""What fault tests saw, and the table of it: `python -m tests.faults` writes tests/README.md.

A fault test has the marker `fault` (it runs in `make test`) or `long_fault` (over a minute: `make test-faults`) and
calls `record` once. Rows wait in .cache/faults, one file a test, until the table is made.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / ".cache/faults"
README = ROOT / "tests/README.md"
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
    """Rows by test as Markdown."""
    lines = ["| fault | injected by | detected in | recovered in | lost | test |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row.test):
        name = row.test.removeprefix("tests/")
        cells = (row.fault, row.injected, _seconds(row.detected_s), _seconds(row.recovered_s), row.lost, f"`{name}`")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "at once" if value is None else f"{value:.1f} s"


def main() -> None:
    """Replace the table between the two marks."""
    rows = [FaultRow(**json.loads(path.read_text())) for path in ROWS.glob("*.json")]
    before, _, rest = README.read_text().partition(START)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{START}\n\n{table(rows)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
