"""From a config to a run that is open: everything that can be checked is, then its directory, record and actors."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import TypeVar, TypeVarTuple

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from actors.placement import PlacementPlan, plan_evaluation, plan_team, plan_trainer_team
from raylign.boundary.beside import end_torch_beside
from raylign.config import EvaluateConfig, OfflineConfig, OnlineDpoConfig, RunConfig
from raylign.config.blocks import ModelBlock
from raylign.config.losses import loss_functions
from raylign.config.reference import ModelReferenceBlock
from raylign.config.scoring import ScoringBlock
from raylign.data.preferences import PreferenceData, load_preferences, mixed_scales
from raylign.errors import RaylignError
from raylign.evaluation.capability.likelihood import Measured
from raylign.models import end_ids, load_tokenizer, require_context, resolve_model
from raylign.pairing import with_mismatched
from raylign.prompts import PromptSet, draw, load_prompts, refused_path
from raylign.records import Prompt
from raylign.reference.checkpoint import resolve_reference
from raylign.report.tables import report_console
from raylign.roles import Generators, Publisher, Scorer, Team, Trainers
from raylign.run.checkpoints import Checkpoint
from raylign.run.directory import continue_or_create, require_continuable, run_path
from raylign.run.fingerprints import fingerprint, model_digest
from raylign.run.inputs import Input, Rows, keep, require_same, rows_input
from raylign.run.sources import module_sources
from raylign.scoring.composition import of_gold
from raylign.scoring.load import describe_scorer, scorer_inputs
from raylign.scoring.verifier import require_references
from raylign.tracking.feed import load_ahead
from raylign.tracking.tracker import open_tracker
from raylign.tracking.uri import default_uri
from recipes.capability import find_tasks, task_inputs
from recipes.commands.failures import told
from recipes.commands.signals import terminable
from recipes.memory import begin_check, evaluation_memory, gpu_bytes
from recipes.model_checks import require_models
from recipes.run import RowSource, Run, recorded, starting
from recipes.sides import Found, find_sides, side_inputs

_CANARY_PROMPTS = 4
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True, slots=True)
class Models:
    """Folders of the policy (or reward model) and of its reference, and the tokenizer. Made by `find_models`."""

    folder: str
    reference: str
    tokenizer: PreTrainedTokenizerBase

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)


def find_models(config: RunConfig) -> Models:
    """Resolve and check both. Raises RaylignError, naming the cure, when the run could not use one of them."""
    folder = resolve_model(config.model.path, config.model.revision)
    reference = resolve_reference(config.measured_against, config.model, folder)
    checked = require_models(config.objective, folder, reference, config.model)
    try:
        for read in dict.fromkeys((folder, reference)):
            require_context(*config.longest, read, config.model)
        tokenizer = load_tokenizer(folder, config.model.trust_remote_code, config.model.chat_template)
    except RaylignError:
        checked()  # files that do not fit are told first
        raise
    checked()
    return Models(folder, reference, tokenizer)


def find_prompts(config: OnlineDpoConfig, models: Models, *, quarantine: bool = True) -> PromptSet:
    """The prompts of an online run, enough of them and with what its scorer reads. Raises RaylignError.

    Bad rows are written to the run's quarantine unless told otherwise.
    """
    prompts = load_prompts(
        config.prompts,
        models.tokenizer,
        config.max_prompt_tokens,
        config.run.seed,
        refused_to=refused_path(config.run) if quarantine else None,
    )
    draw(prompts.train, 1, config.schedule.prompts_per_round, config.run.seed)
    require_references((*prompts.train, *prompts.held_out), config.scoring)
    if (gold := config.evaluation.gold) is not None:
        with of_gold():
            require_references(prompts.held_out, gold)
    return prompts


def find_rows(config: OfflineConfig, models: Models) -> PreferenceData:
    """The rows of a data set in tokens. Raises RaylignError, naming the cure."""
    data = load_preferences(
        config.data,
        models.tokenizer,
        rows=config.rows,
        ends=end_ids(models.tokenizer, [Path(models.folder)]),
        seed=config.run.seed,
        refused_to=refused_path(config.run),
    )
    if config.mismatched:
        length, seed = config.data.max_length, config.run.seed
        train = with_mismatched(data.train, length, seed, "to train on")
        data = replace(data, train=train, held_out=with_mismatched(data.held_out, length, seed, "held out"))
    return data


@contextmanager
def online_run(config: OnlineDpoConfig, recipe: str | None = None) -> Iterator[tuple[Run, PromptSet, Team]]:
    """A run that samples, with its whole team ready and its generators at the newest checkpoint's weights.

    `recipe` is the file with the loop: a run goes on only with the same one.
    """
    from actors.team import team  # noqa: PLC0415 - Ray, which `raylign plan` does without

    # Functions are imported in a process of their own, judges answer in their own time.
    described = _meanwhile(_describe_scorers, config)
    models = find_models(config)
    prompts = find_prompts(config, models)
    tasks = find_tasks(config, models.tokenizer)
    described()
    opened = _opened(config, models, prompts, config.prompts.split, recipe, plan_team, tasks, config.scored_by)
    with opened as (run, plan):
        started = time.monotonic()
        with team(
            config,
            folder=models.folder,
            pad_id=models.pad_id,
            canary_ids=_canary(prompts.held_out),
            plan=plan,
            incidents=run.incidents,
        ) as roles:
            gap = take_up(run, roles, config.model)["logprob_gap_mean"]
            ready = f"team ready in {time.monotonic() - started:.0f} s"
            run.say(f"{ready}; vLLM and trainer differ by {gap:.3f} nats a token on the canary")
            yield run, prompts, roles


def _describe_scorers(config: OnlineDpoConfig) -> None:
    """Raises ScorerError when one cannot be loaded, or does not answer."""
    describe_scorer(config.scoring)
    if (gold := config.evaluation.gold) is not None:
        with of_gold():
            describe_scorer(gold)


@dataclass(frozen=True, slots=True)
class EvaluationRun:
    """A run that compares, opened: its sides, who answers until the next side does, and who scores when all have."""

    run: Run
    sides: Sequence[Found]
    serve: Callable[[Found], Generators]
    scoring: Callable[[], AbstractContextManager[Scorer]]


@contextmanager
def evaluation_run(config: EvaluateConfig, recipe: str | None = None) -> Iterator[EvaluationRun]:
    """A run that trains nothing; the scorer starts when generators have ended. `recipe` as for `online_run`."""
    from actors.cluster import cluster, log_folder  # noqa: PLC0415 - Ray, which `raylign plan` does without
    from actors.team import Answering, Served, scorer_team  # noqa: PLC0415

    described = _meanwhile(describe_scorer, config.scoring)
    path = run_path(config.run)
    default_uri(config.tracking, path)
    sides = find_sides(config)
    rows = sides[0].prompts
    require_references(rows.held_out, config.scoring)
    described()
    inputs = side_inputs(sides, config.source[0]) | dict(scorer_inputs(config.scoring))
    if recipe is not None:
        inputs |= recipe_input(recipe)
    require_same(path, rows, inputs)
    end_torch_beside()
    load_ahead()
    with told(config.run), terminable(config.recovery.grace_s), cluster() as available:
        answering, judging = plan_evaluation(config, available, samples=any(side.given is None for side in sides))
        evaluation_memory(config, sides, answering, judging, gpu_bytes(config.placement)).require_fit()
        directory = continue_or_create(config)
        with directory.locked(), recorded(tracker := open_tracker(directory.path, config.tracking), directory):
            keep(directory.path, inputs)
            console = report_console()
            run = Run(config, directory, tracker, console)
            run.open_record(rows, config.prompts.split)
            console.print(Text(starting(directory, log_folder())), soft_wrap=True)
            with closing(Answering(config, answering, run.incidents)) as answers:

                def serve(side: Found) -> Generators:
                    own = [one for one in sides if (one.folder, one.model) == (side.folder, side.model)]
                    adapted = side.model.lora is not None and any(one.checkpoint for one in own)
                    return answers.serve(Served(side.folder, side.model, side.checkpoint, side.version, adapted))

                def scoring() -> AbstractContextManager[Scorer]:
                    answers.close()
                    return scorer_team(config, judging, run.incidents)

                yield EvaluationRun(run, sides, serve, scoring)


def _meanwhile(function: Callable[[*Ts], T], *args: *Ts) -> Callable[[], T]:
    """Begin the call; what is returned has its answer, or raises. Nobody who leaves without it waits for it."""
    answer: Future[T] = Future()

    def call() -> None:
        try:
            answer.set_result(function(*args))
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=call, name=function.__name__, daemon=True).start()
    return answer.result


@contextmanager
def offline_run(config: OfflineConfig, recipe: str | None = None) -> Iterator[tuple[Run, PreferenceData, Trainers]]:
    """A run on a data set, with its trainers ready at the newest checkpoint. `recipe` as for `online_run`."""
    from actors.team import trainer_team  # noqa: PLC0415 - Ray, which `raylign plan` does without

    models = find_models(config)
    data = find_rows(config, models)
    tasks = find_tasks(config, models.tokenizer)
    with _opened(config, models, data, config.data.split, recipe, plan_trainer_team, tasks) as (run, plan):
        run.say(f"{len(data.train)} rows to train on, {len(data.held_out)} held out; {what_became_of(data)}")
        if note := mixed_scales(data, config.score_options):
            run.say(f"note: {note}")
        started = time.monotonic()
        with trainer_team(
            config, folder=models.folder, pad_id=models.pad_id, plan=plan, incidents=run.incidents
        ) as trainers:
            run.restore(trainers)
            run.say(f"trainers ready in {time.monotonic() - started:.0f} s")
            yield run, data, trainers


C = TypeVar("C", bound=RunConfig)


@contextmanager
def _opened(
    config: C,
    models: Models,
    rows: RowSource,
    split: str,
    recipe: str | None,
    plan: Callable[[C, Mapping[str, float]], PlacementPlan],
    tasks: Sequence[Measured],
    scorers: Mapping[str, ScoringBlock] = MappingProxyType({}),
) -> Iterator[tuple[Run, PlacementPlan]]:
    """Check what is left to check, then open directory and record; leaves nothing behind but the run directory."""
    from actors.cluster import cluster, log_folder  # noqa: PLC0415 - Ray, which `raylign plan` does without

    default_uri(config.tracking, run_path(config.run))
    require_continuable(config)
    inputs = inputs_of(config, rows, models, recipe, scorers) | task_inputs(tasks)
    require_same(run_path(config.run), rows, inputs)
    console = report_console()
    require_memory = begin_check(config, models.folder, rows.train)
    end_torch_beside()
    load_ahead()
    with told(config.run), terminable(config.recovery.grace_s), cluster() as available:
        placement = plan(config, available)
        require_memory(placement)
        directory = continue_or_create(config)
        with directory.locked(), recorded(tracker := open_tracker(directory.path, config.tracking), directory):
            keep(directory.path, inputs)
            run = Run(config, directory, tracker, console, tasks)
            run.open_record(rows, split)
            console.print(Text(starting(directory, log_folder())), soft_wrap=True)
            yield run, placement
        run.summary()


def inputs_of(
    config: RunConfig,
    rows: Rows,
    models: Models,
    recipe: str | None,
    scorers: Mapping[str, ScoringBlock] = MappingProxyType({}),
) -> dict[str, Input]:
    """What a run reads, by its contents: it goes on only with the same.

    By name: the rows, the folders of the models, the template, the file `recipe` with the loop (None: unknown), and
    what the `scorers` read, each by the option that describes it.
    """
    found = {
        "model.path": Input(
            model_digest(Path(models.folder)), f"files of the model's folder {models.folder}", fixed=True
        ),
        config.source[0]: rows_input(rows),
    }
    if config.model.chat_template is not None:
        own = fingerprint(config.model.chat_template).sha256
        found["model.chat_template"] = Input(own, f"the template {config.model.chat_template}", fixed=True)
    if isinstance(reference := config.measured_against, ModelReferenceBlock):
        own = model_digest(Path(models.reference))
        found[f"reference.path={reference.path}"] = Input(own, "files of the reference's folder", fixed=False)
    for function in loss_functions(config.objective):
        what = "the code of the loss, or of what it imports"
        found[f"loss.function={function}"] = Input(module_sources(function).digest, what, fixed=False)
    if recipe is not None:
        found |= recipe_input(recipe)
    return found | {name: one for option, block in scorers.items() for name, one in scorer_inputs(block, option)}


def recipe_input(recipe: str) -> dict[str, Input]:
    """The file with the loop."""
    return {"recipe": Input(fingerprint(Path(recipe)).sha256, f"the recipe's own code, {recipe}", fixed=False)}


def take_up(run: Run, team: Team, block: ModelBlock) -> Mapping[str, float]:
    """Trainer and generators as the newest checkpoint has them; the value is the canary's gaps.

    In the middle of a round all its samples are there: what is served until its end is never asked.
    """
    run.restore(team.trainers)
    return serve_newest(team.publisher, block, run.newest)


def serve_newest(publisher: Publisher, block: ModelBlock, newest: Checkpoint | None) -> Mapping[str, float]:
    """The canary's gaps of the version to go on from.

    Before the first checkpoint both sides have loaded the same files, unless the trainer's base has 4 bits. One in the
    middle of a round is pushed too: the trainers hold it, and nobody samples before the round's end.
    """
    if newest or block.load_in_4bit:
        return publisher.publish(newest.rounds_done if newest else 0)
    return publisher.verify()


def _canary(prompts: Sequence[Prompt]) -> tuple[tuple[int, ...], ...]:
    return tuple(prompt.token_ids for prompt in prompts[:_CANARY_PROMPTS])


def what_became_of(data: PreferenceData) -> str:
    """What became of the rows of the source, in words."""
    left = {name.replace("_", " "): count for name, count in data.counts.items() if count and name != "used"}
    return ", ".join(f"{count} {name}" for name, count in left.items())
