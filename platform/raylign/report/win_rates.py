"""Win rates as people read them."""

from rich import box
from rich.table import Table
from rich.text import Text

from raylign.evaluation.comparison import Comparison
from raylign.evaluation.win_rate import WinRate
from raylign.report.text import one_line

_LONGEST = 40


def win_rate_table(comparison: Comparison) -> Table:
    """One row for each opponent, with one for each category of the prompts below it; rates in percent."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("opponent")
    for header in (
        "prompts",
        f"win rate %\n[{comparison.confidence:.0%}]",
        "at equal lengths\n%",
        "wins\n%",
        "ties\n%",
        "losses\n%",
    ):
        table.add_column(Text(header), justify="right")
    for name, opponent in comparison.opponents.items():
        table.add_row(Text(one_line(name, _LONGEST), style="bold"), *_cells(opponent.overall))
        for category, rate in opponent.categories.items():
            table.add_row(Text(f"  {one_line(category, _LONGEST)}"), *_cells(rate))
    return table


def _cells(rate: WinRate) -> list[str]:
    return [
        str(rate.prompts),
        _interval(rate.rate, rate.low, rate.high),
        _interval(rate.controlled, rate.controlled_low, rate.controlled_high),
        *(f"{100 * share:.1f}" for share in (rate.wins, rate.ties, rate.losses)),
    ]


def _interval(rate: float, low: float, high: float) -> str:
    return f"{100 * rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
