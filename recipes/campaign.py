"""What every recipe needs around its loop: run directory, tracking, prompts, the team on its cluster, a summary."""

import logging
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from actors.cluster import cluster, log_folder
from actors.incidents import Incidents
from actors.team import Team, plan_team, team
from actors.weight_sync.publish import Publisher
from raylign.checkpoints import Checkpoint
from raylign.config import RunConfig
from raylign.config.blocks import ModelBlock
from raylign.errors import ConfigError
from raylign.models import context_limit, load_tokenizer, resolve_model, resolve_reference
from raylign.prompts import PromptSet, draw, load_prompts, refused_path, set_aside
from raylign.records import Evaluation, Prompt, RoundReport
from raylign.reporting import Sample, report_console, round_table, samples_block, warnings
from raylign.rounds import RoundLog, Trained, finished_stages
from raylign.rundir import CONFIG_NAME, RunDirectory, continue_or_create, require_continuable
from raylign.scoring import require_references
from raylign.scoring.describe import describe_scorer
from raylign.text import escape_control, optional
from raylign.tracking.facts import run_facts
from raylign.tracking.journal import JOURNAL_NAME, read_events
from raylign.tracking.tracker import Status, Tracker, open_tracker
from raylign.tracking.uri import default_uri
from recipes.signals import terminable

log = logging.getLogger(__name__)
_CANARY_PROMPTS = 4
_CLOSE_S: dict[Status, float] = {"FINISHED": 30.0, "FAILED": 10.0, "KILLED": 5.0}
"""How long MLflow is waited for at the end; a signal's grace time is short."""


class Campaign:
    """The driver's desk: it knows what is done, writes every record of the run and prints the summary."""

    def __init__(self, config: RunConfig, directory: RunDirectory, tracker: Tracker, console: Console) -> None:
        self.directory = directory
        self._config, self._tracker, self._console = config, tracker, console
        self.incidents = Incidents(config.recovery, tracker.incident)
        self._checkpoints = directory.checkpoint_store(config.trainer.save_total_limit)
        self._newest = self._usable_checkpoint()
        self._evaluations: list[Evaluation] = []
        self._reports = [report for report in directory.reports() if report.index <= self._rounds_done()]
        self._samples: list[Sequence[Sample]] = []
        self._journaled = {(e.name, e.payload.get("round")) for e in read_events(directory.path / JOURNAL_NAME)}

    def _usable_checkpoint(self) -> list[Checkpoint]:
        """The newest good one, unless it is of an unfinished round whose samples or preferences were damaged since."""
        newest = self._checkpoints.newest()
        if not newest or newest[0].round <= self.directory.rounds_finished():
            return newest
        whole = "reference" in finished_stages(self.directory.round(newest[0].round))
        return newest if whole else self._checkpoints.newest(before=newest[0].round)

    def _rounds_done(self) -> int:
        """Rounds with a report whose policy, or a later one, has a good checkpoint."""
        trained = self._newest[0].rounds_done if self._newest else 0
        return min(self.directory.rounds_finished(), trained)

    def open_record(self, prompts: PromptSet) -> None:
        """Say what the run is and goes without, and what an earlier process did not come to say of its last round."""
        self._tracker.campaign_started(self._config, run_facts())
        if ("prompts", None) not in self._journaled:
            counts = {"train": len(prompts.train), "held_out": len(prompts.held_out)}
            self._tracker.prompts(prompts.source, self._config.prompts.split, prompts.digest, counts)
        if note := set_aside(prompts.invalid, self.directory.path):
            self._say(note)
        self._tracker.artifact(self.directory.path / CONFIG_NAME, "config")
        for report in self._reports:
            self._journal(report)

    def _journal(self, report: RoundReport) -> None:
        """Once, also where a damaged checkpoint made a round be trained again."""
        if ("round_finished", report.index) not in self._journaled:
            self._tracker.round_finished(report)

    def rounds_to_do(self) -> range:
        """Rounds that are not finished, in order."""
        return range(len(self._reports) + 1, self._config.schedule.rounds + 1)

    def round_log(self, index: int) -> RoundLog:
        """The log of round `index`; 0 is the evaluation before training."""
        self.incidents.begin_round(index)
        if index:
            self._tracker.round_started(index)
        trained = Trained.of(index, self._newest)
        return RoundLog(index, self.directory, self._tracker, self._console, self._checkpoints, trained)

    def bring_up(self, team: Team) -> Mapping[str, float]:
        """Trainer and generators as the newest checkpoint has them; the value is the canary's gaps.

        In the middle of a round all its samples are there: what is served until its end is never asked.
        """
        team.trainers.restore(self._newest)
        newest = next(iter(self._newest), None)
        if newest is not None:
            done = f"round {newest.round}" if newest.complete else f"{len(newest.steps)} steps of round {newest.round}"
            self._say(f"going on after {done}, from {newest.folder}")
        return agree_on_weights(team.publisher, self._config.model, newest)

    def team_ready(self, seconds: float, gaps: Mapping[str, float]) -> None:
        """Say that every role has started and that generators and trainer agree on the weights."""
        gap = gaps["logprob_gap_mean"]
        self._say(f"team ready in {seconds:.0f} s; vLLM and trainer differ by {gap:.3f} nats a token on the canary")

    def finish_baseline(self, evaluation: Evaluation, samples: Sequence[Sample]) -> None:
        """Record the evaluation before round 1."""
        self._evaluations.append(evaluation)
        self._samples.append(samples[: self._config.evaluation.samples])
        self.directory.write_baseline(evaluation)
        if ("evaluation", 0) not in self._journaled:
            self._tracker.baseline(evaluation)
        self._say(f"round 0: held-out score {evaluation.score:.3f}, KL {optional(evaluation.kl)} nats")

    def finish_round(self, report: RoundReport, samples: Sequence[Sample]) -> None:
        """Record the round; a round without this call has not happened."""
        self._reports.append(report)
        self._samples.append(samples[: self._config.evaluation.samples])
        self.directory.write_report(report)
        self._journal(report)
        evaluation = report.evaluation
        self._say(
            f"round {report.index}: held-out score {evaluation.score:.3f}, KL {optional(evaluation.kl)} nats, "
            f"{report.counts['preferences']} pairs, {sum(report.seconds.values()):.0f} s"
        )

    def summary(self) -> None:
        """The table of rounds, samples before and after, and what may be wrong."""
        if not self._reports:
            return
        baseline = self._evaluations[0]
        if self._samples[0] and len(self._samples) > 1:
            self._console.print(samples_block("held-out samples", self._samples[0], self._samples[-1]))
        self._console.print(round_table(baseline, self._reports))
        for warning in warnings(baseline, self._reports):
            self._say(f"note: {warning}")
        self._say(f"results: {self.directory.path}")
        self._say(f"MLflow:  mlflow ui --backend-store-uri {default_uri(self._config.tracking, self.directory.path)}")
        self._say(f"export:  raylign export {self.directory.path} --to DIR")

    def _say(self, line: str) -> None:
        self._console.print(Text(escape_control(line)), soft_wrap=True)


def finished_before(config: RunConfig) -> list[RunDirectory]:
    """The run directory of `config` if all its rounds are done; says so. [] when there is something to do."""
    require_continuable(config)
    directory = RunDirectory((config.run.dir / config.run.name).absolute())
    if directory.rounds_finished() < config.schedule.rounds:
        return []
    console = report_console()
    console.print(round_table(directory.baseline(), directory.reports()))
    console.print(Text(f"all {config.schedule.rounds} rounds are done: {directory.path}"), soft_wrap=True)
    return [directory]


@contextmanager
def campaign(config: RunConfig) -> Iterator[tuple[Campaign, PromptSet, Team]]:
    """Check everything that can be checked, then start the team; leaves nothing behind but the run directory."""
    folder = resolve_model(config.model.path, config.model.revision)
    resolve_reference(config.reference, config.model, folder)
    tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
    prompts = load_prompts(
        config.prompts, tokenizer, config.max_prompt_tokens, config.run.seed, refused_to=refused_path(config.run)
    )
    draw(prompts.train, 1, config.schedule.prompts_per_round, config.run.seed)
    _require_context(config, context_limit(folder, config.model.trust_remote_code))
    require_references((*prompts.train, *prompts.held_out), config.scoring)
    describe_scorer(config.scoring)
    default_uri(config.tracking, config.run.dir / config.run.name)
    require_continuable(config)
    console = report_console()
    with terminable(config.recovery.grace_s), cluster() as available:
        plan = plan_team(config, available)
        directory = continue_or_create(config)
        with directory.locked(), recorded(tracker := open_tracker(directory.path, config.tracking), directory):
            run = Campaign(config, directory, tracker, console)
            run.open_record(prompts)
            console.print(Text(f"starting; actor logs are in {log_folder()}"), soft_wrap=True)
            canary, pad_id, started = _canary(prompts.held_out), int(tokenizer.pad_token_id), time.monotonic()
            with team(
                config, folder=folder, pad_id=pad_id, canary_ids=canary, plan=plan, incidents=run.incidents
            ) as roles:
                gaps = run.bring_up(roles)
                run.team_ready(time.monotonic() - started, gaps)
                yield run, prompts, roles
        run.summary()


def agree_on_weights(publisher: Publisher, block: ModelBlock, newest: Checkpoint | None) -> Mapping[str, float]:
    """The canary's gaps of the version to go on from.

    Of version 0 both sides loaded the same checkpoint, unless the trainer's base has 4 bits.
    """
    version = newest.rounds_done if newest else 0
    return publisher.publish(version) if version or block.load_in_4bit else publisher.verify()


def _require_context(config: RunConfig, limit: int) -> None:
    asked = config.generators.max_model_len
    if asked > limit:
        raise ConfigError(
            f"generators.max_model_len={asked} is more than the {limit} positions of {config.model.path}; lower it"
        )


def _canary(prompts: Sequence[Prompt]) -> tuple[tuple[int, ...], ...]:
    return tuple(prompt.token_ids for prompt in prompts[:_CANARY_PROMPTS])


@contextmanager
def recorded(tracker: Tracker, directory: RunDirectory) -> Iterator[None]:
    """Give the campaign its true final status, whatever ends it."""
    status: Status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        missing = tracker.close(status, _CLOSE_S[status])
        if missing:
            log.warning(
                "MLflow misses %d event(s) of this run, all of them safe in %s; once it answers: raylign sync %s",
                missing,
                directory.path / JOURNAL_NAME,
                shlex.quote(str(directory.path)),
            )
