"""What recipes on a data set need around their loop: its rows in tokens, and the trainers on their cluster."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from actors.cluster import cluster, log_folder
from actors.team import plan_trainer_team, trainer_team
from raylign.config import OfflineConfig
from raylign.config.losses import TrainerLoss
from raylign.config.reference import ReferenceBlock
from raylign.data.preferences import PreferenceData, load_preferences, mixed_scales
from raylign.models import end_ids, load_tokenizer, require_context, resolve_model
from raylign.models.load import require_fit
from raylign.pairing import with_mismatched
from raylign.prompts import refused_path
from raylign.reference.checkpoint import resolve_reference
from raylign.report.tables import report_console
from raylign.roles import Trainers
from raylign.run.directory import continue_or_create, require_continuable, run_path
from raylign.run.inputs import keep, require_same
from raylign.tracking.tracker import open_tracker
from raylign.tracking.uri import default_uri
from raylign.training.learners import require_learnable
from recipes.campaign import Campaign, recorded, starting
from recipes.commands.failures import told
from recipes.commands.signals import terminable
from recipes.inputs import inputs_of


@contextmanager
def offline_campaign(
    config: OfflineConfig, loss: TrainerLoss, reference: ReferenceBlock, recipe: str | None = None
) -> Iterator[tuple[Campaign, PreferenceData, Trainers]]:
    """Check everything that can be checked, then start the trainers; leaves nothing behind but the run directory.

    `recipe` is the file with the loop: a run goes on only with the same one.
    """
    folder = resolve_model(config.model.path, config.model.revision)
    require_learnable(loss, folder, config.model)
    measured = find_reference(config, reference, folder)
    data, pad_id = load_rows(config, folder)
    default_uri(config.tracking, run_path(config.run))
    require_continuable(config)
    inputs = inputs_of(config, data, model=folder, reference=measured, recipe=recipe)
    require_same(run_path(config.run), data, inputs)
    console = report_console()
    with told(config.run), terminable(config.recovery.grace_s), cluster() as available:
        plan = plan_trainer_team(config, available)
        directory = continue_or_create(config)
        with directory.locked(), recorded(tracker := open_tracker(directory.path, config.tracking), directory):
            keep(directory.path, inputs)
            run = Campaign(config, directory, tracker, console)
            run.open_record(data, config.data.split)
            run.say(f"{len(data.train)} rows to train on, {len(data.held_out)} held out; {said(data)}")
            if note := mixed_scales(data, config.score_options):
                run.say(f"note: {note}")
            console.print(Text(starting(directory, log_folder())), soft_wrap=True)
            started = time.monotonic()
            with trainer_team(
                config,
                loss,
                reference,
                folder=folder,
                pad_id=pad_id,
                plan=plan,
                incidents=run.incidents,
            ) as trainers:
                run.restore(trainers)
                run.say(f"trainers ready in {time.monotonic() - started:.0f} s")
                yield run, data, trainers
        run.summary()


def find_reference(config: OfflineConfig, reference: ReferenceBlock, folder: str) -> str:
    """Folder of the reference's weights, where `folder` is the policy's. Raises RaylignError when it cannot be used."""
    found = resolve_reference(reference, config.model, folder)
    if found != folder:
        require_fit(found, config.model.trust_remote_code)
    require_context("data.max_length", config.data.max_length, found, config.model)
    return found


def load_rows(config: OfflineConfig, folder: str) -> tuple[PreferenceData, int]:
    """The rows in tokens, and the id of the padding token. Raises RaylignError, naming the cure."""
    tokenizer = load_tokenizer(folder, config.model.trust_remote_code, config.model.chat_template)
    require_context("data.max_length", config.data.max_length, folder, config.model)
    data = load_preferences(
        config.data,
        tokenizer,
        rows=config.rows,
        ends=end_ids(tokenizer, [Path(folder)]),
        seed=config.run.seed,
        refused_to=refused_path(config.run),
    )
    if config.mismatched:
        length, seed = config.data.max_length, config.run.seed
        train = with_mismatched(data.train, length, seed, "to train on")
        data = replace(data, train=train, held_out=with_mismatched(data.held_out, length, seed, "held out"))
    return data, int(tokenizer.pad_token_id)


def said(data: PreferenceData) -> str:
    """What became of the rows of the source."""
    left = {name.replace("_", " "): count for name, count in data.counts.items() if count and name != "used"}
    return ", ".join(f"{count} {name}" for name, count in left.items())
