"""The `raylign` command. What a command needs is imported when it runs, so that `--help` answers at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup
from typer.exceptions import TyperException

from raylign.boundary.beside import torch_beside
from raylign.config import load_config, load_recipe
from raylign.report.console import libraries_aside, log_to_console, own_stdout
from recipes.commands.checks.ray_cluster import require_named_cluster
from recipes.commands.failures import complain, say
from recipes.commands.review import review
from recipes.commands.signals import INTERRUPTED, STOPPED, terminable

_CHECKS = "raylign.training.learners"
"""What the checks of `recipes.model_checks` need."""
_STOPS = {INTERRUPTED: "interrupted", STOPPED: "stopped by SIGTERM"}


@contextmanager
def ended_cleanly() -> Iterator[None]:
    """An error becomes a line that says what happened and one with the cure, and status 1; waiting for people is 3.

    Ctrl-C and SIGTERM unwind what is open.
    """
    try:
        with terminable():
            yield
    except (typer.Exit, typer.Abort, TyperException):
        raise
    except Exception as error:
        raise typer.Exit(say(error)) from error
    except SystemExit as end:
        if end.code in (INTERRUPTED, STOPPED):
            complain(f"{_STOPS[end.code]}; what is finished is saved, the same command goes on with it")
        raise


class Commands(TyperGroup):
    """Runs every command inside `ended_cleanly`."""

    def invoke(self, ctx: Any) -> Any:
        with ended_cleanly():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    name="raylign",
    help="Iterative online DPO: sample, score, prefer, train, publish, evaluate.",
    epilog="Start with `raylign doctor`, then `raylign plan RECIPE.yaml`, then `raylign run RECIPE.yaml`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the console script."""
    log_to_console()
    app()


def _no_options(values: Any) -> Any:
    """Settings that look like options of other programs get the form they have here."""
    words = [str(word) for word in (values if isinstance(values, list) else [values])]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("-"):
            name, _, value = word.lstrip("-").partition("=")
            example = f"{name}={value or following or 'VALUE'}"
            raise typer.BadParameter(f"{word} is no option; settings of a recipe are written key=value: {example}")
    return values


Recipe = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", callback=_no_options, help="The recipe's file.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        callback=_no_options,
        help="Settings that replace the recipe's, such as sampling.temperature=0.7 or model.lora.r=32.",
    ),
]
# Unknown options become arguments, for `_no_options` to explain.
SETTINGS_CONTEXT = {"ignore_unknown_options": True}


@app.callback(invoke_without_command=True)
def options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the installed version and leave.")] = False,
) -> None:
    if show_version:
        typer.echo(f"raylign {_version()}")
        raise typer.Exit


def _version() -> str:
    try:
        return version("raylign")
    except PackageNotFoundError:
        return "(not installed)"


@app.command(context_settings=SETTINGS_CONTEXT)
@libraries_aside()
@torch_beside(_CHECKS)
def run(recipe: Recipe, settings: Settings = None) -> None:
    """Run a recipe, until its schedule is done: online DPO, offline DPO, SFT or a reward model.

    Example: raylign run recipes/sentiment_smollm2.yaml run.name=second schedule.rounds=3
    """
    config = load_recipe(recipe, settings or ())
    require_named_cluster()
    from recipes.recipe import recipe_of  # noqa: PLC0415 - transformers and Ray

    recipe_of(config).main(config)


@app.command(context_settings=SETTINGS_CONTEXT)
@libraries_aside()
@torch_beside(_CHECKS)
def resume(
    run_directory: Annotated[
        Path, typer.Argument(metavar="RUN", callback=_no_options, help="A run's directory, such as runs/online-dpo.")
    ],
    settings: Settings = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT", help="Go on with what this input is now; a refused start names it.", show_default=False
        ),
    ] = None,
) -> None:
    """Go on with a run at its first stage that is not finished; settings given here replace its own from then on.

    The same `raylign run` again does so too, without other settings. Example: raylign resume runs/online-dpo
    trainer.learning_rate=1e-4 schedule.rounds=8
    """
    from recipes.commands.resume import resumed_config  # noqa: PLC0415

    config = resumed_config(run_directory, settings or (), accept or ())
    require_named_cluster()
    from recipes.recipe import recipe_of  # noqa: PLC0415 - transformers and Ray

    recipe_of(config).main(config)


@app.command()
@libraries_aside()
def sync(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, such as runs/online-dpo.")],
    uri: Annotated[
        str | None,
        typer.Option(metavar="URI", help="MLflow server or database; the run's own by default.", show_default=False),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="Give up when MLflow has not answered for so long.")
    ] = 60.0,
) -> None:
    """Send MLflow what it misses of a run that has ended, each event once; a run that was killed is marked so.

    Status 1 when MLflow does not answer. Example: raylign sync runs/online-dpo --uri http://127.0.0.1:5000
    """
    from raylign.report.tables import report_console  # noqa: PLC0415
    from recipes.commands.sync import sync_run  # noqa: PLC0415 - mlflow

    console = report_console()
    synced = sync_run(run_directory, uri, timeout, console)
    all_but = f"all but {synced.aside} trace(s) that it fails at" if synced.aside else "all of them"
    done = f"sent {synced.sent} of {synced.total} events to MLflow at {synced.uri}; it has {all_but}"
    console.print(Text(f"{done}, status {synced.status}"), soft_wrap=True)


@app.command(context_settings=SETTINGS_CONTEXT)
def submit(
    recipe: Recipe,
    settings: Settings = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The dashboard, http://HEAD:8265; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS."),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder that travels with the job; the recipe is in it.")
    ] = Path(),
    wait: Annotated[bool, typer.Option(help="Show the job's output until its end, and exit with its status.")] = True,
) -> None:
    """Run a recipe on a Ray cluster as a job, which outlives this terminal.

    A cluster with a token needs RAY_AUTH_MODE=token here too. Example: raylign submit
    recipes/sentiment_smollm2.yaml run.dir=/shared/runs --address http://127.0.0.1:8265
    """
    from recipes.commands.submit import cluster_address, prepare  # noqa: PLC0415 - Ray
    from recipes.commands.submit import submit as submit_job  # noqa: PLC0415

    job = prepare(recipe, settings or (), working_dir)
    status = submit_job(job, cluster_address(address, os.environ), wait=wait, console=Console())
    if status:
        raise typer.Exit(status)


@app.command(context_settings=SETTINGS_CONTEXT)
@libraries_aside()
@torch_beside(_CHECKS)
def plan(recipe: Recipe, settings: Settings = None) -> None:
    """Show what a recipe would run and what it needs, starting nothing. Status 1 when it could not run here.

    Example: raylign plan recipes/sentiment_smollm2.yaml trainer.ranks=2
    """
    config = load_recipe(recipe, settings or ())
    from raylign.report.tables import report_console  # noqa: PLC0415
    from recipes.recipe import recipe_of  # noqa: PLC0415 - transformers and Ray

    recipe_of(config).plan(config, report_console())


@app.command()
@libraries_aside()
def doctor(
    tracking_uri: Annotated[
        str, typer.Option(metavar="URI", help="MLflow server or database to look at.")
    ] = "sqlite:///runs/mlflow.db",
) -> None:
    """Check this machine: packages, devices, compiler, memory, disk, Ray and MLflow, each with its cure.

    Status 1 only when something stops every run. Example: raylign doctor --tracking-uri http://127.0.0.1:5000
    """
    from raylign.report.tables import report_console  # noqa: PLC0415
    from recipes.commands import doctor as checks  # noqa: PLC0415 - keeps --help fast

    if not checks.doctor(tracking_uri, report_console()):
        raise typer.Exit(1)


def _wanted(version: str | None) -> int | Literal["best"] | None:
    """The version that was asked for."""
    if version is None:
        return None
    if version == "best":
        return "best"
    if not version.isdecimal():
        raise typer.BadParameter(f"{version!r} is neither a number nor best", param_hint="--version")
    return int(version)


@app.command()
@libraries_aside()
def export(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, such as runs/online-dpo.")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the model.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA adapter into its base model.")] = False,
    version: Annotated[
        str | None,
        typer.Option(
            metavar="N|best",
            help="Policy version, or the best by evaluation.metric_for_best_model; the newest by default.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write the trained policy as a folder for transformers, vLLM and the hub, with tokenizer and model card.

    Example: raylign export runs/sentiment-smollm2 --to exported --merge
    """
    from recipes.commands.export import export_run  # noqa: PLC0415 - torch and transformers

    exported = export_run(run_directory, to, merge=merge, version=_wanted(version))
    console = Console(file=own_stdout(), soft_wrap=True)
    console.print(Text(f"policy version {exported.version} is in {exported.folder}"))
    console.print(Text(f"use it: {exported.use}"))


@app.command()
@libraries_aside()
def promote(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, such as runs/online-dpo.")],
    version: Annotated[
        str | None,
        typer.Option(metavar="N|best", help="As for export; the newest by default.", show_default=False),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A run of the recipe evaluate, on prompts of its own.", show_default=False),
    ] = None,
    above: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="What the lower bound of the win rate must exceed.")
    ] = 0.5,
    tolerated: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="By which share a task of capability may be worse than before training."),
    ] = 0.05,
    force: Annotated[
        str | None, typer.Option(metavar="REASON", help="Promote it all the same; the reason is kept.")
    ] = None,
) -> None:
    """Make a policy version the champion in MLflow's registry, if it beats the present one and nothing speaks against.

    Status 1 when the gate refuses. Example: raylign promote runs/online-dpo --evaluation runs/evaluate
    """
    if force is not None and not force.strip():
        raise typer.BadParameter("give a reason, which is kept with the version", param_hint="--force")
    from raylign.report.tables import report_console  # noqa: PLC0415
    from recipes.commands.promote import promote_run  # noqa: PLC0415 - mlflow, scipy, transformers

    wanted, console = _wanted(version), report_console()
    promote_run(
        run_directory, console, version=wanted, evaluation=evaluation, above=above, tolerated=tolerated, force=force
    )


@app.command()
@libraries_aside()
def compare(
    run_directories: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Directories of runs.")],
) -> None:
    """Put runs side by side: results with paired intervals against the first, and the options that differ.

    Example: raylign compare runs/first runs/second
    """
    from raylign.report.tables import report_console  # noqa: PLC0415
    from recipes.commands.compare import compare_runs  # noqa: PLC0415 - scipy, Arrow

    compare_runs(run_directories, report_console())


data = typer.Typer(name="data", help="Prepare preference data.", no_args_is_help=True)
app.add_typer(data)
app.add_typer(review)


@data.command("prepare", context_settings=SETTINGS_CONTEXT)
@libraries_aside()
def data_prepare(recipe: Recipe, settings: Settings = None) -> None:
    """Make clean, mixed pairs of any sources: ratings weighed, duplicates and templates dropped, shares of languages.

    Example: raylign data prepare recipes/data/prepare_demo.yaml output=prepared mix.size=7500
    """
    from raylign.config.prepare import PrepareConfig  # noqa: PLC0415

    config = load_config(recipe, settings or (), kind=PrepareConfig)
    from raylign.report.tables import report_console  # noqa: PLC0415
    from recipes.commands.data_prepare import main as prepare  # noqa: PLC0415 - datasets, matplotlib

    prepare(config, report_console())


if __name__ == "__main__":
    main()
