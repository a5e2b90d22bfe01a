"""Register a run's policies in MLflow, and make one of them the champion once it has passed the gate."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from raylign.boundary.secrets import without_credentials
from raylign.config import OfflineConfig, RunConfig
from raylign.errors import ConfigError, NotPromoted, RaylignError, TrackingError
from raylign.evaluation.evidence import Version, evaluated_evidence, own_evidence
from raylign.evaluation.gate import Evidence, Facts, Refusal, refusals
from raylign.models import load_tokenizer, resolve_model
from raylign.records import Prompt
from raylign.report.text import escape_control
from raylign.review.record import run_identity
from raylign.run.directory import RunDirectory, open_run
from raylign.run.inputs import require_same, rows_input
from raylign.tracking.feed import load_state
from raylign.tracking.mlflow_store import shown
from raylign.tracking.registry import CAMPAIGN, CHAMPION, RUN, VERSION, Policy, Registered, Registry, policies_of
from raylign.tracking.uri import default_uri
from recipes.commands.export import best_of
from recipes.opening import Models, find_rows

_NO_OTHER = "name the champion by a version that raylign has registered, or promote all the same with --force REASON"


def promote_run(
    run: Path,
    console: Console,
    *,
    version: int | Literal["best"] | None = None,
    evaluation: Path | None = None,
    above: float = 0.5,
    tolerated: float = 0.05,
    force: str | None = None,
) -> int:
    """Register what is missing of the run directory `run`, then promote `version` (None: the newest) if it may be.

    Returns its number in the registry. Raises NotPromoted with every condition that it does not meet, unless `force`
    says why it is promoted all the same; ConfigError where there is no such run or version; RaylignError where MLflow
    does not answer or does not know the run.
    """
    directory, config = _with_policies(run)
    report = directory.finished_round(best_of(directory, config) if version == "best" else version)
    directory.whole_checkpoint(report.policy_version)
    campaign, name = run_identity(directory.path), config.tracking.registered_model or config.run.name
    uri = default_uri(config.tracking, directory.path)
    with _asking(uri):
        registry, policies = Registry(uri, name), policies_of(directory, campaign)
        added = registry.add(policies, _run_id(registry, directory, uri))
        champion = registry.champion()
    own = next(policy for policy in policies if policy.report.index == report.index)
    told = f"version {report.policy_version} of {directory.path}"
    _say(console, f"{added} of {len(policies)} versions are new in MLflow's registered model {name}")
    if champion is not None and champion.is_policy(own):
        _say(console, f"{told} is the champion already: models:/{name}@{CHAMPION}")
        return champion.number
    evidence = _evidence(directory, config, own, champion, evaluation)
    refused = refusals(evidence, _facts(directory, own), above, tolerated)
    if refused and force is None:
        error = NotPromoted(f"{told} is not promoted:" + "".join(f"\n  {refusal.told}" for refusal in refused))
        error.cure = "see above, condition by condition; or promote it all the same and say why: --force REASON"
        raise error
    with _asking(uri):
        over = None if champion is None else champion.number
        number = registry.promote(own, _reasons(evidence, refused, force), over)
    if isinstance(evidence, Evidence):
        _say(console, f"win rate: {evidence.told}")
    for refusal in refused:
        _say(console, f"forced past {refusal.condition}: {refusal.found}")
    _say(console, f"{told} is the champion: models:/{name}@{CHAMPION}, version {number} there")
    return number


def _evidence(
    directory: RunDirectory,
    config: RunConfig,
    own: Policy,
    champion: Registered | None,
    evaluation: Path | None,
) -> Evidence | Refusal:
    mine = Version(directory.path, own.campaign, own.report.policy_version)
    other = Version(directory.path, own.campaign, 0)
    if champion is not None:
        if not {CAMPAIGN, RUN, VERSION} <= champion.tags.keys() or not champion.tags[VERSION].isdecimal():
            found = f"the champion, version {champion.number} in MLflow, has no tags that say which policy it is"
            return Refusal("champion", found, _NO_OTHER)
        other = Version(Path(champion.tags[RUN]), champion.tags[CAMPAIGN], int(champion.tags[VERSION]))
    if evaluation is not None:
        rows = _rows(directory, config) if isinstance(config, OfflineConfig) else []
        return evaluated_evidence(evaluation, directory, config, mine, other, rows)
    return own_evidence(directory, config, own.report, mine, other)


def _rows(directory: RunDirectory, config: OfflineConfig) -> list[Prompt]:
    """Prompts that a run on a data set has read. Raises ConfigError when the data set is not the run's any more."""
    folder, block = resolve_model(config.model.path, config.model.revision), config.model
    tokenizer = load_tokenizer(folder, block.trust_remote_code, block.chat_template)
    data = find_rows(config, Models(folder, folder, tokenizer))
    require_same(directory.path, data, {config.source[0]: rows_input(data)})
    return [row.prompt for row in (*data.train, *data.held_out)]


def _facts(directory: RunDirectory, own: Policy) -> Facts:
    reports = [one for one in directory.reports() if one.index <= own.report.index]
    decisions = directory.decisions(own.report.index) or ()
    return Facts(decisions, [directory.baseline(), *(one.evaluation for one in reports)])


def _reasons(evidence: Evidence | Refusal, refused: list[Refusal], force: str | None) -> dict[str, str]:
    """Tags of the new champion."""
    found = {"gate": "; ".join(f"refused by {refusal.condition}" for refusal in refused) or "passed"}
    if isinstance(evidence, Evidence):
        found |= {"gate.win_rate": f"{evidence.rate:.6g}", "gate.win_rate_low": f"{evidence.low:.6g}"}
        found["gate.evidence"] = shown(evidence.told)
    if refused and force is not None:
        found["forced"] = shown(force)
    return found


def _with_policies(run: Path) -> tuple[RunDirectory, RunConfig]:
    """Raises ConfigError for a run that trains no policy."""
    directory = open_run(run)
    config = directory.config((f"run.dir={directory.path.parent}",))
    if config.trains_rewards or not config.rounds:
        raise ConfigError(
            f"{directory.path} is a run of the recipe {config.recipe}, which trains no policy that answers prompts; "
            "promote one of online_dpo, offline_dpo or sft"
        )
    return directory, config


def _run_id(registry: Registry, directory: RunDirectory, uri: str) -> str:
    """The parent run in MLflow. Raises RaylignError where MLflow has none."""
    run_id = load_state(directory.path, uri).run_id
    if not run_id or not registry.has(run_id):
        error = RaylignError(f"MLflow at {without_credentials(uri)} has no run of {directory.path} to register from")
        error.cure = f"raylign sync {directory.path}"
        raise error
    return run_id


@contextmanager
def _asking(uri: str) -> Iterator[None]:
    """What MLflow fails at becomes an error with its address."""
    try:
        yield
    except TrackingError as error:
        failure = RaylignError(f"MLflow at {without_credentials(uri)}, where policies are registered, fails ({error})")
        failure.cure = error.cure or "put it right and run the same command again: what it has is not made twice"
        raise failure from error


def _say(console: Console, line: str) -> None:
    console.print(Text(escape_control(line)), soft_wrap=True)
