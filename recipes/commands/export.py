"""A run's policy as a folder that transformers, vLLM and the hub read."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from raylign.config import OfflineDpoConfig, OnlineDpoConfig, RunConfig
from raylign.errors import ConfigError, RecordError
from raylign.evaluation.guard import guarded
from raylign.export.card import PolicyFacts, RewardModelFacts, framework_versions, public_name
from raylign.export.policy import ADAPTER_CONFIG, export_model, require_place
from raylign.export.reward_model import export_reward_model
from raylign.models import resolve_model
from raylign.records import HeldOutEvaluation, RoundReport
from raylign.run.directory import RunDirectory, open_run
from raylign.tracking.journal import JOURNAL_NAME, read_events
from recipes.recipe import recipe_of

_VERSION = "version."
_TAGS = TypeAdapter(dict[str, str])
_NO_4_BITS = "  # first: vLLM would put the adapter on the 16-bit base, the adapter was trained on 4 bits"


@dataclass(frozen=True, slots=True)
class Exported:
    """Where the model is, the policy version it has, and how it is put to use."""

    folder: Path
    version: int
    use: str


def export_run(run: Path, to: Path, *, merge: bool, version: int | Literal["best"] | None) -> Exported:
    """Export a policy version of the run directory `run`, by default the newest whose round is finished, to `to`.

    `best` is the one that the run has chosen.

    Raises ConfigError when there is no such run or version, RecordError when its checkpoint is damaged, ModelError as
    `export_model` does.
    """
    directory = open_run(run)
    if to.absolute().is_relative_to(directory.path):
        raise ConfigError(f"{to}: inside the run directory {directory.path}; give a folder outside of it")
    require_place(to.absolute())
    config = directory.config()
    report = directory.finished_round(best_of(directory, config) if version == "best" else version)
    finished = [other.policy_version for other in directory.reports()]
    checkpoint = directory.whole_checkpoint(report.policy_version, finished).folder
    base = resolve_model(config.model.path, config.model.revision)
    if config.trains_rewards:
        return _export_reward_model(directory, config, report, checkpoint, base, to.absolute())
    in_4bit = config.model if config.model.load_in_4bit else None
    facts = card_facts(directory, config, report)
    template, trust = config.model.chat_template, config.model.trust_remote_code
    folder = export_model(checkpoint, base, to.absolute(), merge, facts, in_4bit, template, trust)
    stays_adapter = (folder / ADAPTER_CONFIG).is_file()
    if stays_adapter and in_4bit:
        use = f"{shlex.join(['raylign', 'export', str(run), '--to', f'{folder}-merged', '--merge'])}{_NO_4_BITS}"
    else:
        use = usage(folder, base if stays_adapter else None, config)
    return Exported(folder, report.policy_version, use)


def _export_reward_model(
    directory: RunDirectory, config: RunConfig, report: RoundReport, checkpoint: Path, base: str, to: Path
) -> Exported:
    """A whole model, whatever was trained: sequence classifiers are served without adapters."""
    if not isinstance(report.evaluation, HeldOutEvaluation):
        raise RecordError(
            f"{directory.round(report.index)}: its report has the evaluation of samples, and the run is of a reward "
            "model; restore report.json from a copy"
        )
    facts = RewardModelFacts(
        name=config.run.name,
        base_model=public_name(config.model.path),
        data=public_name(config.source[1]),
        loss=f"`{config.objective.loss_type}`",
        metrics=report.evaluation.metrics,
        versions=training_versions(directory),
    )
    in_4bit = config.model if config.model.load_in_4bit else None
    template, trust = config.model.chat_template, config.model.trust_remote_code
    folder = export_reward_model(checkpoint, base, to, facts, in_4bit, template, trust)
    return Exported(folder, report.policy_version, f"as a scorer: scoring.type=reward_model scoring.path={folder}")


def best_of(directory: RunDirectory, config: RunConfig) -> int:
    """The version that the run has chosen. Raises ConfigError where it chooses none, or none that was trained."""
    if config.choice is None:
        raise ConfigError(
            f"{directory.path}: this run chooses no best version (evaluation.metric_for_best_model is null); give the "
            "number of a version"
        )
    best = directory.best(config)
    measure = config.choice.metric_for_best_model
    if best is None or best.version == 0:
        found = "no finished round has it" if best is None else f"the model before training is best ({best.value:.4g})"
        raise ConfigError(f"{directory.path}: no trained version is best by {measure}: {found}; give --version N")
    return best.version


def card_facts(directory: RunDirectory, config: RunConfig, report: RoundReport) -> PolicyFacts:
    """What the model card tells of the run up to `report`, with the loss that its round was trained by."""
    if isinstance(config, OnlineDpoConfig | OfflineDpoConfig):
        config = guarded(config, config.loss, directory.decisions_before(report.index))
    return PolicyFacts(
        name=config.run.name,
        base_model=public_name(config.model.path),
        dataset=public_name(config.source[1]),
        method=recipe_of(config).method(config),
        rounds=report.index,
        evaluation=report.evaluation,
        confidence=config.confidence,
        versions=training_versions(directory),
    )


def training_versions(directory: RunDirectory) -> dict[str, str]:
    """Framework versions as the run's journal has them; those installed here when there is no journal."""
    journal = directory.path / JOURNAL_NAME
    started = (
        next((e for e in read_events(journal) if e.name == "campaign_started"), None) if journal.is_file() else None
    )
    if started is None:
        return framework_versions()
    tags = started.get("tags", _TAGS)
    return {name.removeprefix(_VERSION): value for name, value in tags.items() if name.startswith(_VERSION)}


def usage(folder: Path, base: str | None, config: RunConfig) -> str:
    """`base` is the folder that an exported adapter needs, None for a whole model."""
    if base is None or config.model.lora is None:
        return shlex.join(["vllm", "serve", str(folder)])
    # vLLM reserves buffers for powers of two from 8 up.
    rank = max(8, 1 << (config.model.lora.r - 1).bit_length())
    adapter = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{config.run.name}={folder}"]
    return shlex.join(["vllm", "serve", base, *adapter])
