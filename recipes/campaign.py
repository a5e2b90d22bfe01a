"""What every recipe needs around its loop: run directory, tracking, prompts, the team on its cluster, a summary."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from actors.cluster import cluster, log_folder
from actors.incidents import Incidents
from actors.team import Team, plan_team, team
from actors.weight_sync.publish import Publisher
from raylign.config import RunConfig
from raylign.config.blocks import ModelBlock
from raylign.errors import ConfigError
from raylign.models import context_limit, load_tokenizer, resolve_model, resolve_reference
from raylign.prompts import PromptSet, draw, load_prompts
from raylign.records import Evaluation, Prompt, RoundReport
from raylign.reporting import Sample, report_console, round_table, samples_block, warnings
from raylign.rounds import RoundLog
from raylign.rundir import RunDirectory, create_run
from raylign.scoring import describe_function
from raylign.text import optional
from raylign.tracking.facts import run_facts
from raylign.tracking.tracker import Status, Tracker, open_tracker
from raylign.tracking.uri import default_uri
from recipes.signals import terminable

log = logging.getLogger(__name__)
_CANARY_PROMPTS = 4


class Campaign:
    """The driver's desk: it writes every record of the run and prints the summary."""

    def __init__(self, config: RunConfig, directory: RunDirectory, tracker: Tracker, console: Console) -> None:
        self.directory = directory
        self._config, self._tracker, self._console = config, tracker, console
        self._evaluations: list[Evaluation] = []
        self._reports: list[RoundReport] = []
        self._samples: list[Sequence[Sample]] = []

    def round_log(self, index: int) -> RoundLog:
        """The log of round `index`; 0 is the evaluation before training."""
        if index:
            self._tracker.round_started(index)
        return RoundLog(index, self.directory, self._tracker, self._console)

    def team_ready(self, seconds: float, gaps: Mapping[str, float]) -> None:
        """Say that every role has started and that generators and trainer agree on the weights."""
        gap = gaps["logprob_gap_mean"]
        self._say(f"team ready in {seconds:.0f} s; vLLM and trainer differ by {gap:.3f} nats a token on the canary")

    def finish_baseline(self, evaluation: Evaluation, samples: Sequence[Sample]) -> None:
        """Record the evaluation before round 1."""
        self._evaluations.append(evaluation)
        self._samples.append(samples[: self._config.evaluation.samples])
        self.directory.write_baseline(evaluation)
        self._tracker.baseline(evaluation)
        self._say(f"round 0: held-out score {evaluation.score:.3f}, KL {optional(evaluation.kl)} nats")

    def finish_round(self, report: RoundReport, samples: Sequence[Sample], team: Team) -> None:
        """Save the policy and record the round; a round without this call has not happened."""
        self._save_policy(report.policy_version, team)
        self._reports.append(report)
        self._samples.append(samples[: self._config.evaluation.samples])
        self.directory.write_report(report)
        self._tracker.round_finished(report)
        evaluation = report.evaluation
        self._say(
            f"round {report.index}: held-out score {evaluation.score:.3f}, KL {optional(evaluation.kl)} nats, "
            f"{report.counts['preferences']} pairs, {sum(report.seconds.values()):.0f} s"
        )

    def _save_policy(self, version: int, team: Team) -> None:
        keep = self._config.trainer.save_total_limit
        with self.directory.new_checkpoint(version, keep) as folder:
            if self._config.model.lora is None:
                team.trainers.save_weights(str(folder / "model.safetensors"))
            else:
                team.trainers.save_adapter(str(folder))

    def summary(self) -> None:
        """The table of rounds, samples before and after, and what may be wrong."""
        if not self._reports:
            return
        baseline = self._evaluations[0]
        if self._samples[0]:
            self._console.print(samples_block("held-out samples", self._samples[0], self._samples[-1]))
        self._console.print(round_table(baseline, self._reports))
        for warning in warnings(baseline, self._reports):
            self._say(f"note: {warning}")
        self._say(f"results: {self.directory.path}")
        self._say(f"MLflow:  mlflow ui --backend-store-uri {default_uri(self._config.tracking, self.directory.path)}")
        self._say(f"export:  raylign export {self.directory.path} --to DIR")

    def _say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


@contextmanager
def campaign(config: RunConfig) -> Iterator[tuple[Campaign, PromptSet, Team]]:
    """Check everything that can be checked, then start the team; leaves nothing behind but the run directory."""
    folder = resolve_model(config.model.path, config.model.revision)
    resolve_reference(config.reference, config.model, folder)
    tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
    prompts = load_prompts(config.prompts, tokenizer, config.max_prompt_tokens, config.run.seed)
    draw(prompts.train, 1, config.schedule.prompts_per_round, config.run.seed)
    _require_context(config, context_limit(folder, config.model.trust_remote_code))
    describe_function(config.scoring.function)
    default_uri(config.tracking, config.run.dir / config.run.name)
    console = report_console()
    with terminable(), cluster() as available:
        plan = plan_team(config, available)
        directory = create_run(config.run, config)
        tracker = open_tracker(directory.path, config.tracking)
        with _recorded(tracker):
            run = Campaign(config, directory, tracker, console)
            _open_record(config, tracker, directory, prompts)
            console.print(Text(f"starting; actor logs are in {log_folder()}"), soft_wrap=True)
            canary = _canary(prompts.held_out)
            started = time.monotonic()
            incidents = Incidents(config.recovery, tracker.incident)
            with team(
                config,
                folder=folder,
                pad_id=int(tokenizer.pad_token_id),
                canary_ids=canary,
                plan=plan,
                incidents=incidents,
            ) as roles:
                gaps = agree_on_weights(roles.publisher, config.model)
                run.team_ready(time.monotonic() - started, gaps)
                yield run, prompts, roles
        run.summary()


def agree_on_weights(publisher: Publisher, block: ModelBlock) -> Mapping[str, float]:
    """The canary's gaps of version 0: both sides loaded the same checkpoint, unless the trainer's base has 4 bits."""
    return publisher.publish(0) if block.load_in_4bit else publisher.verify()


def _require_context(config: RunConfig, limit: int) -> None:
    asked = config.generators.max_model_len
    if asked > limit:
        raise ConfigError(
            f"generators.max_model_len={asked} is more than the {limit} positions of {config.model.path}; lower it"
        )


def _open_record(config: RunConfig, tracker: Tracker, directory: RunDirectory, prompts: PromptSet) -> None:
    tracker.campaign_started(config, run_facts())
    counts = {"train": len(prompts.train), "held_out": len(prompts.held_out)}
    tracker.prompts(prompts.source, config.prompts.split, prompts.digest, counts)
    tracker.artifact(directory.path / "config.yaml", "config")


def _canary(prompts: Sequence[Prompt]) -> tuple[tuple[int, ...], ...]:
    return tuple(prompt.token_ids for prompt in prompts[:_CANARY_PROMPTS])


@contextmanager
def _recorded(tracker: Tracker) -> Iterator[None]:
    """Give the campaign its true final status, whatever ends it."""
    status: Status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        missing = tracker.close(status)
        if missing:
            log.warning("%d events have not reached MLflow; they are in the run's events.jsonl", missing)
