"""The page on architectures says what the start check finds, on a tiny random model of each."""

import pytest

from tests.unit import architectures
from tests.unit.architectures import CAUSAL, PAGE, page

LINES = PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", CAUSAL)
def test_the_page_says_what_is_found(name: str) -> None:
    (line,) = [line for line in LINES if line.startswith(f"| {name} |")]
    assert line == architectures.row(name)


def test_the_page_is_what_its_command_writes() -> None:
    rows = [line for line in LINES if line.startswith("| ")][1:]
    assert PAGE.read_text(encoding="utf-8") == page(rows)
    assert [row.split(" | ")[0][2:] for row in rows] == list(CAUSAL)
    assert len(rows) >= 25
