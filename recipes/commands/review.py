"""`raylign review`: what people read of a run, and what they answer about its pairs in MLflow."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from raylign.config import OnlineDpoConfig
from raylign.errors import ConfigError
from raylign.report.console import libraries_aside
from raylign.report.text import escape_control

if TYPE_CHECKING:
    from raylign.run.directory import RunDirectory

REPORT = "report.html"
review = typer.Typer(name="review", help="Read what came of a run; ask people about its pairs.", no_args_is_help=True)
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, such as runs/online-dpo.")]


class By(StrEnum):
    """Ways to choose pairs."""

    disagreement = "disagreement"
    uncertainty = "uncertainty"
    random = "random"


@review.command()
@libraries_aside()
def show(
    run_directory: RunPath,
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
    from raylign.report.win_rates import win_rate_table  # noqa: PLC0415
    from raylign.review.waiting import open_questions  # noqa: PLC0415
    from raylign.run.directory import open_run  # noqa: PLC0415
    from raylign.run.files import disk_errors  # noqa: PLC0415

    def say(line: str, style: str = "") -> None:
        console.print(Text(escape_control(line), style=style), soft_wrap=True)

    record = read_run(open_run(run))
    found = verdict(record)
    say(found.sentence, "bold")
    if waits := open_questions(record.path):
        say(f"waiting for people, open questions: {waits}; once they are answered in MLflow the run can go on")
    for note in found.notes:
        say(f"note: {note}")
    for outcome in found.outcomes:
        say(outcome)
    if record.comparison is not None:
        console.print(win_rate_table(record.comparison))
    elif record.baseline is not None:
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


@review.command("send")
@libraries_aside()
def send(
    run_directory: RunPath,
    by: Annotated[
        By, typer.Option(help="Where scorers contradict each other, where scores are closest, or drawn.")
    ] = By.random,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Pairs chosen in this way, all told.")] = 20,
) -> None:
    """Put pairs of a run into a review queue of MLflow, where people say which answer is better.

    The same command again adds nothing; a larger N adds the next pairs. Example: raylign review send
    runs/sentiment-smollm2 --by uncertainty --count 50
    """
    from raylign.report.tables import report_console  # noqa: PLC0415
    from raylign.review.choose import choose, scored_answers  # noqa: PLC0415 - mlflow
    from raylign.review.record import run_identity  # noqa: PLC0415
    from raylign.review.run_review import RunReview, new_pairs  # noqa: PLC0415

    directory, config = _online(run_directory)
    answers = scored_answers(directory, config.scoring)
    chosen = choose(answers, by.value, config.scoring, run_identity(directory.path), config.run.seed)
    run_review = RunReview(config)
    with run_review.record.locked():
        new = new_pairs(run_review.record.pairs(), chosen, by.value, count)
        sent, pairs = run_review.send(new), run_review.record.pairs()
    console, found = report_console(), sum(pair.by == by.value for pair in pairs)
    where = run_review.address()
    _say(console, f"{len(new)} pairs chosen by {by.value}, {sent} sent; the queue has {len(pairs)}: {where}")
    if found < count:
        _say(console, f"note: {found} of {count}: the run has no other pair of this kind that nobody was asked about")


@review.command("pull")
@libraries_aside()
def pull(run_directory: RunPath) -> None:
    """Read what people answered: agreement with each scorer and each other, position bias, a calibrated judge.

    Answers are in review/answers.json of the run, the rest in review/report.json. Example: raylign review pull
    runs/sentiment-smollm2
    """
    from raylign.report.tables import report_console  # noqa: PLC0415
    from raylign.review.report import print_report, review_report, save_report  # noqa: PLC0415
    from raylign.review.run_review import RunReview  # noqa: PLC0415 - mlflow

    directory, config = _online(run_directory)
    run_review, console = RunReview(config), report_console()
    with run_review.record.locked():
        pairs = run_review.record.pairs()
        if not pairs:
            raise ConfigError(
                f"{directory.path} has asked nobody yet; begin with: raylign review send {directory.path}"
            )
        pulled = run_review.pull()
        report = review_report(directory, config.scoring, pairs, pulled.said, config.run.seed)
        path = save_report(directory.path, report)
    if pulled.unknown:
        _say(
            console,
            f"note: MLflow has lost {pulled.unknown} of the pairs; answers that were read before are kept. Send them "
            f"again: raylign review send {directory.path}",
        )
    if pulled.strangers:
        _say(console, f"note: {pulled.strangers} other traces in the queue are left alone")
    print_report(report, console)
    _say(console, f"written: {path}")


def _online(run_directory: Path) -> "tuple[RunDirectory, OnlineDpoConfig]":
    """Raises ConfigError for a run that samples no candidates."""
    from raylign.run.directory import open_run  # noqa: PLC0415 - keeps --help fast

    directory = open_run(run_directory)
    config = directory.config((f"run.dir={directory.path.parent}",))
    if not isinstance(config, OnlineDpoConfig):
        raise ConfigError(f"{directory.path} is a run on a data set: it has no candidates to ask people about")
    return directory, config


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)
