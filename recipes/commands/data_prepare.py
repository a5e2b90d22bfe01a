"""Clean and mix preference data: `raylign data prepare recipes/data/prepare_demo.yaml`, or this file as a script."""

import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raylign.config.load import load_config
from raylign.config.prepare import PrepareConfig
from raylign.data.prepare import PAIRS_NAME, Report, prepare
from raylign.data.prepare.accounts import MEANINGS
from raylign.data.prepare.page import speed_line
from raylign.report.tables import report_console
from raylign.report.text import escape_control


def main(config: PrepareConfig, console: Console) -> Report:
    """Prepare, then show what became of every row and pair, and where the results are."""
    report = prepare(config, console)
    console.print(fates_table(report))
    for note in report.notes:
        console.print(_text(f"note: {note}"), soft_wrap=True)
    console.print(_text(speed_line(report)), soft_wrap=True)
    console.print(_text(f"pairs: {config.output / PAIRS_NAME}"), soft_wrap=True)
    console.print(_text(f"report: {config.output / 'report.md'}"), soft_wrap=True)
    return report


def fates_table(report: Report) -> Table:
    """Fates that some row or pair had, and the sums over all."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for header in ("of", "fate", "count", "meaning"):
        table.add_column(header, justify="right" if header == "count" else "left")
    for what, counts in (("rows", report.rows), ("pairs", report.pairs)):
        table.add_row(what, "all", f"{sum(counts.values()):,}", "")
        for fate, count in counts.items():
            if count:
                table.add_row("", fate, f"{count:,}", MEANINGS[fate])
    kept = report.pairs["kept"]
    for language, count in report.languages.items():
        table.add_row("kept", _text(language), f"{count:,}", f"{100 * count / kept:.1f} %")
    return table


def _text(line: str) -> Text:
    return Text(escape_control(line))


if __name__ == "__main__":
    main(load_config(Path(sys.argv[1]), sys.argv[2:], kind=PrepareConfig), report_console())
