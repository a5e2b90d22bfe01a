"""Win rates as people read them."""

from rich import box
from rich.table import Table
from rich.text import Text

from raylign.evaluation.comparison import Comparison
from raylign.evaluation.win_rate import WinRate
from raylign.report.text import one_line

_LONGEST = 40
INDENT = "  "
"""Before the name of a category."""


def win_rate_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The head, and one row for each opponent, with one for each category of the prompts below it; rates in percent."""
    head = [
        "opponent",
        "prompts",
        f"win rate %\n[{comparison.confidence:.0%}]",
        "at equal lengths\n%",
        *("wins\n%", "ties\n%", "losses\n%"),
    ]
    rows = []
    for name, opponent in comparison.opponents.items():
        rows.append([one_line(name, _LONGEST), *_cells(opponent.overall)])
        rows += [
            [f"{INDENT}{one_line(category, _LONGEST)}", *_cells(rate)] for category, rate in opponent.categories.items()
        ]
    return head, rows


def win_rate_table(comparison: Comparison) -> Table:
    """`win_rate_rows` for a terminal."""
    head, rows = win_rate_rows(comparison)
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for place, header in enumerate(head):
        table.add_column(Text(header), justify="right" if place else "left")
    for name, *cells in rows:
        table.add_row(Text(name, style="" if name.startswith(INDENT) else "bold"), *cells)
    return table


def _cells(rate: WinRate) -> list[str]:
    return [
        str(rate.prompts),
        _interval(rate.rate, rate.low, rate.high),
        _interval(rate.controlled, rate.controlled_low, rate.controlled_high),
        *(f"{100 * share:z.1f}" for share in (rate.wins, rate.ties, rate.losses)),
    ]


def _interval(rate: float, low: float, high: float) -> str:
    return f"{100 * rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
