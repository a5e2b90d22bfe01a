"""`raylign review`: what people read of a run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from raylign.report.console import libraries_aside
from raylign.report.text import escape_control

REPORT = "report.html"
review = typer.Typer(name="review", help="Read what came of a run.", no_args_is_help=True)


@review.command()
@libraries_aside()
def show(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, such as runs/online-dpo.")],
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="The report; RUN/report.html by default.", show_default=False),
    ] = None,
) -> None:
    """Print the verdict and the table of rounds, and write one HTML report that needs no network and no other file.

    A run that is still at work has a report too, of what is finished. Example: raylign review show runs/online-dpo
    """
    from raylign.report.tables import report_console  # noqa: PLC0415

    show_run(run_directory, to, report_console())


def show_run(run: Path, to: Path | None, console: Console) -> Path:
    """Print what came of the run directory `run`; returns the report's file.

    Raises RaylignError when it is none, when a file of it cannot be read, or when the report cannot be written.
    """
    # Arrow, scipy and matplotlib take seconds to load.
    from raylign.report.figures import pictures  # noqa: PLC0415
    from raylign.report.page import report_page  # noqa: PLC0415
    from raylign.report.record import read_run  # noqa: PLC0415
    from raylign.report.summary import rounds_table  # noqa: PLC0415
    from raylign.report.verdict import verdict  # noqa: PLC0415
    from raylign.run.directory import open_run  # noqa: PLC0415
    from raylign.run.files import disk_errors  # noqa: PLC0415

    def say(line: str, style: str = "") -> None:
        console.print(Text(escape_control(line), style=style), soft_wrap=True)

    record = read_run(open_run(run))
    found = verdict(record)
    say(found.sentence, "bold")
    for note in found.notes:
        say(f"note: {note}")
    if record.baseline is not None:
        console.print(rounds_table(record.baseline, record.reports))
    file = (to or record.path / REPORT).absolute()
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(report_page(record, found, pictures(record)).encode("utf-8", "replace"))
    say(f"report:  {file}")
    for name, command in record.commands.items():
        if name != "report":
            say(f"{name}:".ljust(9) + command)
    return file
