"""`raylign review`: people answer about pairs of a run in MLflow, and their answers come back."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from raylign.config import OnlineDpoConfig
from raylign.errors import ConfigError
from raylign.report.console import libraries_aside

if TYPE_CHECKING:
    from raylign.run.directory import RunDirectory

review = typer.Typer(name="review", help="Let people answer about pairs of a run.", no_args_is_help=True)
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, such as runs/online-dpo.")]


class By(StrEnum):
    """Ways to choose pairs."""

    disagreement = "disagreement"
    uncertainty = "uncertainty"
    random = "random"


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
    from raylign.review.desk import ReviewDesk, new_pairs  # noqa: PLC0415
    from raylign.review.record import run_identity  # noqa: PLC0415

    directory, config = _online(run_directory)
    answers = scored_answers(directory, config.scoring)
    chosen = choose(answers, by.value, config.scoring, run_identity(directory.path), config.run.seed)
    desk = ReviewDesk(config)
    with desk.record.locked():
        new = new_pairs(desk.record.pairs(), chosen, by.value, count)
        sent, total = desk.send(new), len(desk.record.pairs())
    _say(
        report_console(), f"{len(new)} pairs chosen by {by.value}, {sent} sent; the queue has {total}: {desk.address()}"
    )


@review.command("pull")
@libraries_aside()
def pull(run_directory: RunPath) -> None:
    """Read what people answered: agreement with each scorer and each other, position bias, a calibrated judge.

    Answers are in review/answers.json of the run, the rest in review/report.json. Example: raylign review pull
    runs/sentiment-smollm2
    """
    from raylign.report.tables import report_console  # noqa: PLC0415
    from raylign.review.desk import ReviewDesk  # noqa: PLC0415 - mlflow
    from raylign.review.report import print_report, review_report, save_report  # noqa: PLC0415

    directory, config = _online(run_directory)
    desk, console = ReviewDesk(config), report_console()
    with desk.record.locked():
        pairs = desk.record.pairs()
        if not pairs:
            raise ConfigError(
                f"{directory.path} has asked nobody yet; begin with: raylign review send {directory.path}"
            )
        pulled = desk.pull()
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
