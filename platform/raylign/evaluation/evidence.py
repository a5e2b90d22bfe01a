"""Win rates that may promote a policy version: on prompts that were never used to choose it."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from raylign.config import EvaluateConfig, OnlineDpoConfig, RunConfig
from raylign.errors import ConfigError
from raylign.evaluation.comparison import OF_A_RUN, Comparison, Opponent
from raylign.evaluation.gate import Evidence, Refusal
from raylign.evaluation.win_rate import scored_pairs, win_rate
from raylign.records import Message, Prompt, RoundReport
from raylign.run.directory import REPORT_NAME, RunDirectory, open_run
from raylign.run.files import read_record
from raylign.run.fingerprints import model_digest
from raylign.run.inputs import known_inputs
from raylign.run.rounds import HELD_OUT, candidate_files
from raylign.run.tables import read_candidates, read_messages

_REPORT = TypeAdapter(Comparison)
_POLICY = "policy"
_UNUSED, _EVALUATION = "unused prompts", "evaluation"
"""Conditions of refusals."""


@dataclass(frozen=True, slots=True)
class Version:
    """A policy version of a run directory, 0 being the model before training. `campaign` is the run's own id."""

    run: Path
    campaign: str
    version: int

    @property
    def told(self) -> str:
        return "the initial policy" if self.version == 0 else f"the champion, version {self.version} of {self.run}"

    @property
    def option(self) -> str:
        """As a side of the recipe `evaluate`."""
        return f"{{type: run, run: {self.run}, version: {self.version}}}"


def chosen_by(directory: RunDirectory, config: OnlineDpoConfig, version: int) -> str | None:
    """How the scores of held-out prompts may have chosen `version`; None where they have not."""
    if (block := config.choice) is not None:
        return (
            f"this run chooses by them (evaluation.metric_for_best_model={block.metric_for_best_model}, "
            f"early_stopping_patience={block.early_stopping_patience})"
        )
    newest = max(report.policy_version for report in directory.reports())
    if version != newest:
        return f"version {version} was picked with the scores of {newest} versions in view; only the newest is not"
    return None


def own_evidence(
    directory: RunDirectory, config: RunConfig, report: RoundReport, own: Version, other: Version
) -> Evidence | Refusal:
    """The win rate of a version on the run's own held-out prompts, by the scorer it was trained on.

    Refused where these have chosen it, or where `other` did not answer them, as nobody does in a run on a data set.
    """
    if not isinstance(config, OnlineDpoConfig):
        found = f"0 held-out prompts are answered in a run of the recipe {config.recipe}, which has no win rate"
        return Refusal(_UNUSED, found, _cure(own, other))
    if how := chosen_by(directory, config, own.version):
        return Refusal(_UNUSED, f"0 held-out prompts are left that chose nothing: {how}", _cure(own, other))
    if other.campaign != own.campaign:
        found = f"{other.told} is of another run and has not answered the held-out prompts of {directory.path}"
        return Refusal(_UNUSED, found, _cure(own, other))
    rounds = {one.policy_version: one.index for one in directory.reports()} | {0: 0}
    if other.version not in rounds:
        return Refusal(_UNUSED, f"{directory.path} has no report of {other.told} any more", _cure(own, other))
    answers = read_candidates(directory.round(report.index) / HELD_OUT)
    pairs = scored_pairs(*answers, *read_candidates(directory.round(rounds[other.version]) / HELD_OUT))
    if not pairs:
        found = f"0 held-out prompts have a scored answer of both version {own.version} and {other.told}"
        return Refusal(_UNUSED, found, _cure(own, other))
    won, confidence = win_rate(pairs, config.confidence), config.confidence
    return Evidence(won.rate, won.low, won.high, won.prompts, confidence, other.told, "held-out prompts of the run")


def evaluated_evidence(
    path: Path,
    directory: RunDirectory,
    config: RunConfig,
    own: Version,
    other: Version,
    rows: Sequence[Prompt] = (),
) -> Evidence | Refusal:
    """The win rate that the run directory `path` of the recipe `evaluate` found for `own` over `other`.

    Refused where it is of other weights, compares with others, or asks prompts that the run has seen: sampled answers
    to, or read in the `rows` of its data set. Raises ConfigError when `path` is no finished run of that recipe.
    """
    evaluation = open_run(path)
    evaluated = evaluation.config()
    if not isinstance(evaluated, EvaluateConfig):
        raise ConfigError(f"--evaluation {path} is a run of the recipe {evaluated.recipe}; give one of evaluate")
    if not (evaluation.path / REPORT_NAME).is_file():
        raise ConfigError(
            f"--evaluation {path} is not finished; go on with it: {shlex.join(['raylign', 'resume', str(path)])}"
        )
    found = read_record(evaluation.path / REPORT_NAME, _REPORT)
    cure = _cure(own, other)
    if not _is(found.policy, own):
        return Refusal(_EVALUATION, f"{path} is of {found.policy}, not of version {own.version} of {own.run}", cure)
    known = known_inputs(evaluation.path)
    weights = model_digest(directory.whole_checkpoint(own.version).folder)
    if _POLICY not in known or not known[_POLICY].sha256.endswith(weights):
        return Refusal(
            _EVALUATION, f"{path} is of other weights than {directory.checkpoint(own.version)} has now", cure
        )
    opponent = _opponent(found, config, other)
    if opponent is None:
        names = ", ".join(one.against for one in found.opponents.values())
        return Refusal(_EVALUATION, f"{path} compares with {names}, not with {other.told}", cure)
    if shared := _shared(evaluation, directory, rows):
        wrong = f"{len(shared)} of its prompts were asked by the run too, 0 may be; the first: {shared[0][:80]!r}"
        return Refusal(_UNUSED, f"{path}: {wrong}", cure)
    won = opponent.overall
    where = f"prompts of {evaluation.path}, by {found.scorer}"
    return Evidence(won.rate, won.low, won.high, won.prompts, found.confidence, other.told, where)


def _cure(own: Version, other: Version) -> str:
    """How to come by an evaluation that will do."""
    options = (f"policy={own.option}", f"opponents={{other: {other.option}}}", "prompts.source=FILE")
    command = shlex.join(["raylign", "run", "recipes/evaluate_smollm2.yaml", *options])
    return f"evaluate on prompts that the run has not seen, and give --evaluation RUN: {command}"


def _is(told: str, version: Version) -> bool:
    """Whether a side of an evaluation is this version."""
    match = OF_A_RUN.fullmatch(told)
    if match is None:
        return False
    return int(match[1]) == version.version and Path(match[2]).resolve() == version.run.resolve()


def _opponent(found: Comparison, config: RunConfig, other: Version) -> Opponent | None:
    """The side that is `other`: the initial policy is also the model that the run began with."""
    begun = f"{config.model.path}{f' at {config.model.revision}' if config.model.revision else ''}"
    for opponent in found.opponents.values():
        if _is(opponent.against, other) or (other.version == 0 and opponent.against == begun):
            return opponent
    return None


def _shared(evaluation: RunDirectory, directory: RunDirectory, rows: Iterable[Prompt]) -> list[str]:
    """Texts of the evaluation's prompts that the run has asked or read, in training or held out."""
    held_out = directory.round(0) / HELD_OUT
    files = [held_out] if held_out.is_file() else []
    for report in directory.reports():
        files += candidate_files(directory.round(report.index))
    seen = {*_texts(files), *(_key(_said(prompt.messages)) for prompt in rows)}
    asked = _texts(candidate_files(evaluation.round(0)))
    return [text for key, text in asked.items() if key in seen]


def _texts(files: Iterable[Path]) -> dict[str, str]:
    """Prompts by what they say: system messages, letter case and white space make no other prompt."""
    found: dict[str, str] = {}
    for file in files:
        for messages in read_messages(file).values():
            text = _said(messages)
            found.setdefault(_key(text), text)
    return found


def _key(text: str) -> str:
    return " ".join(text.split()).casefold()


def _said(messages: Sequence[Message]) -> str:
    said = [message for message in messages if message.get("role") != "system"]
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in said)
