"""What the online recipe needs around its loop: its prompts, and the team on its cluster, in agreement."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.text import Text

from actors.cluster import cluster, log_folder
from actors.team import plan_team, team
from raylign.config import OnlineDpoConfig
from raylign.config.blocks import ModelBlock
from raylign.models import load_tokenizer, require_context, resolve_model
from raylign.models.load import require_fit
from raylign.prompts import PromptSet, draw, load_prompts, refused_path
from raylign.records import Prompt
from raylign.reference.checkpoint import resolve_reference
from raylign.report.tables import report_console
from raylign.roles import Publisher, Team
from raylign.run.checkpoints import Checkpoint
from raylign.run.directory import continue_or_create, require_continuable, run_path
from raylign.run.inputs import keep, require_same
from raylign.scoring import require_references
from raylign.scoring.describe import describe_scorer
from raylign.tracking.tracker import open_tracker
from raylign.tracking.uri import default_uri
from raylign.training.learners import require_learnable
from recipes.campaign import Campaign, recorded, starting
from recipes.commands.failures import told
from recipes.commands.signals import terminable
from recipes.inputs import inputs_of

_CANARY_PROMPTS = 4


@contextmanager
def campaign(config: OnlineDpoConfig, recipe: str | None = None) -> Iterator[tuple[Campaign, PromptSet, Team]]:
    """Check everything that can be checked, then start the team; leaves nothing behind but the run directory.

    `recipe` is the file with the loop: a run goes on only with the same one.
    """
    folder = resolve_model(config.model.path, config.model.revision)
    require_learnable(config.loss, folder, config.model)
    measured = resolve_reference(config.reference, config.model, folder)
    if measured != folder:
        require_fit(measured, config.model.trust_remote_code)
    for read in (folder, measured):
        require_context("generators.max_model_len", config.generators.max_model_len, read, config.model)
    tokenizer = load_tokenizer(folder, config.model.trust_remote_code, config.model.chat_template)
    prompts = load_prompts(
        config.prompts, tokenizer, config.max_prompt_tokens, config.run.seed, refused_to=refused_path(config.run)
    )
    draw(prompts.train, 1, config.schedule.prompts_per_round, config.run.seed)
    require_references((*prompts.train, *prompts.held_out), config.scoring)
    describe_scorer(config.scoring)
    default_uri(config.tracking, run_path(config.run))
    require_continuable(config)
    inputs = inputs_of(config, prompts, model=folder, reference=measured, recipe=recipe)
    require_same(run_path(config.run), prompts, inputs)
    console = report_console()
    with told(config.run), terminable(config.recovery.grace_s), cluster() as available:
        plan = plan_team(config, available)
        directory = continue_or_create(config)
        with directory.locked(), recorded(tracker := open_tracker(directory.path, config.tracking), directory):
            keep(directory.path, inputs)
            run = Campaign(config, directory, tracker, console)
            run.open_record(prompts, config.prompts.split)
            console.print(Text(starting(directory, log_folder())), soft_wrap=True)
            canary, pad_id, started = _canary(prompts.held_out), int(tokenizer.pad_token_id), time.monotonic()
            with team(
                config, folder=folder, pad_id=pad_id, canary_ids=canary, plan=plan, incidents=run.incidents
            ) as roles:
                gap = bring_up(run, roles, config.model)["logprob_gap_mean"]
                ready = f"team ready in {time.monotonic() - started:.0f} s"
                run.say(f"{ready}; vLLM and trainer differ by {gap:.3f} nats a token on the canary")
                yield run, prompts, roles
        run.summary()


def bring_up(run: Campaign, team: Team, block: ModelBlock) -> Mapping[str, float]:
    """Trainer and generators as the newest checkpoint has them; the value is the canary's gaps.

    In the middle of a round all its samples are there: what is served until its end is never asked.
    """
    run.restore(team.trainers)
    return agree_on_weights(team.publisher, block, run.newest)


def agree_on_weights(publisher: Publisher, block: ModelBlock, newest: Checkpoint | None) -> Mapping[str, float]:
    """The canary's gaps of the version to go on from.

    Of version 0 both sides loaded the same checkpoint, unless the trainer's base has 4 bits.
    """
    version = newest.rounds_done if newest else 0
    return publisher.publish(version) if version or block.load_in_4bit else publisher.verify()


def _canary(prompts: Sequence[Prompt]) -> tuple[tuple[int, ...], ...]:
    return tuple(prompt.token_ids for prompt in prompts[:_CANARY_PROMPTS])
