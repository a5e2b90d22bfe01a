"""Policy versions in MLflow's model registry, and who of them is `candidate` and `champion`.

MLflow's server takes as a version's source only what is an artifact of the version's run, never a folder of the host.
So each version has one: `policies/0003/policy.json` of the parent run, which says where the checkpoint stands, what its
files are and how it is exported. A database takes the same.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.entities.paged_list import PagedList

from raylign.errors import NotPromoted, TrackingError
from raylign.records import Evaluation, RoundReport
from raylign.report.measures import measured, measures_of, written
from raylign.report.text import inline
from raylign.run.directory import RunDirectory
from raylign.run.fingerprints import MANIFEST_NAME, fingerprint
from raylign.tracking.mlflow_store import MlflowStore

CANDIDATE, CHAMPION = "candidate", "champion"
CAMPAIGN, RUN, VERSION, WEIGHTS = "raylign.campaign", "raylign.run", "raylign.version", "raylign.weights"
"""Tags that say which policy a version is: the run's own id, its directory, the policy version, the manifest's hash."""
SINCE, UNTIL = "champion_since", "champion_until"
PROMOTING = "promoting"
"""The tag of a version that is being made the champion, since when."""
_AT_IT = timedelta(minutes=1)
_TAKEN, _UNKNOWN = "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"
_PER_PAGE = 200
_ABOUT = (
    "Policies trained by raylign, a version for each finished round with a checkpoint. `candidate` is the newest, "
    "`champion` the one that `raylign promote` let through its gate; earlier champions have the tag `champion_until`."
)


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy version with a checkpoint. `weights` is the sha256 (hex) of the checkpoint's manifest."""

    directory: RunDirectory
    campaign: str
    report: RoundReport
    weights: str

    @property
    def identity(self) -> dict[str, str]:
        """Tags that no other policy has."""
        return {CAMPAIGN: self.campaign, VERSION: str(self.report.policy_version), WEIGHTS: self.weights}

    @property
    def tags(self) -> dict[str, str]:
        """What to filter versions by. MLflow's pages cut off all but the first."""
        evaluation = self.report.evaluation
        found = {"round": str(self.report.index)}
        if isinstance(evaluation, Evaluation):
            found["score"] = f"{evaluation.score:z.3f}"
            if evaluation.win_rate is not None:
                found["win_rate"] = f"{evaluation.win_rate:.3f}"
        return found | self.identity | {RUN: str(self.directory.path)}

    @property
    def about(self) -> str:
        """Markdown: what it has reached, then what it is. MLflow's list of versions shows the first words, as typed."""
        values = measured(self.report.evaluation)
        reached = [
            f"{measure.title} {written(measure, values)}"
            for measure in measures_of(self.report.evaluation)
            if measure.low and not measure.detail and values.get(measure.name) is not None
        ]
        which = f"Policy version {self.report.policy_version} of {inline(str(self.directory.path))}"
        return f"{'; '.join(reached)}. {which}: `{self.export}`"

    @property
    def export(self) -> str:
        """The command that makes a model's folder of it."""
        run, number = str(self.directory.path), str(self.report.policy_version)
        return shlex.join(["raylign", "export", run, "--version", number, "--to", "exported", "--merge"])

    @property
    def pointer(self) -> str:
        """`policy.json`: where it is."""
        found = {
            "run": str(self.directory.path),
            "version": self.report.policy_version,
            "checkpoint": str(self.directory.checkpoint(self.report.policy_version)),
            "manifest_sha256": self.weights,
            "export": self.export,
        }
        return json.dumps(found, indent=1)


@dataclass(frozen=True, slots=True)
class Registered:
    """A version in the registry, by its number there."""

    number: int
    tags: Mapping[str, str]

    def is_policy(self, policy: Policy) -> bool:
        return policy.identity.items() <= self.tags.items()


def policies_of(directory: RunDirectory, campaign: str) -> list[Policy]:
    """The policies of finished rounds that still have a checkpoint with its manifest, oldest first."""
    found = []
    for report in directory.reports():
        manifest = directory.checkpoint(report.policy_version) / MANIFEST_NAME
        if manifest.is_file():
            found.append(Policy(directory, campaign, report, fingerprint(manifest).sha256))
    return sorted(found, key=lambda policy: policy.report.policy_version)


class Registry(MlflowStore):
    """One registered model. Every method raises TrackingError, whose `passing` says whether waiting may help."""

    def __init__(self, uri: str, name: str) -> None:
        """The registered model called `name`, which need not be there."""
        super().__init__(uri)
        self._name = name

    def versions(self) -> list[Registered]:
        """All versions, oldest first."""
        found: list[Registered] = []
        token: str | None = None
        while True:
            page: PagedList[ModelVersion] = self._ask(
                partial(self._client.search_model_versions, f"name='{self._name}'", _PER_PAGE, page_token=token)
            )
            found += [Registered(int(one.version), dict(one.tags)) for one in page]
            if not (token := page.token):
                return sorted(found, key=lambda one: one.number)

    def add(self, policies: Sequence[Policy], run_id: str) -> int:
        """Register what is not there of `policies` of the MLflow run `run_id`; returns how many that were.

        The newest version of all is the candidate then.
        """
        self._make()
        known = self.versions()
        missing = [policy for policy in policies if not any(one.is_policy(policy) for one in known)]
        for policy in missing:
            folder = f"policies/{policy.report.policy_version:04d}-{policy.weights[:8]}"
            self.log_text(run_id, policy.pointer, f"{folder}/policy.json")
            self._ask(
                partial(
                    self._client.create_model_version,
                    self._name,
                    f"runs:/{run_id}/{folder}",
                    run_id,
                    tags=policy.tags,
                    description=policy.about,
                    await_creation_for=0,
                )
            )
        if (newest := max((one.number for one in self.versions()), default=None)) is not None:
            self._point(CANDIDATE, newest)
        return len(missing)

    def champion(self) -> Registered | None:
        """The version that was promoted last."""
        number = self.aliases().get(CHAMPION)
        return next((one for one in self.versions() if one.number == number), None)

    def promote(self, policy: Policy, tags: Mapping[str, str], over: int | None) -> int:
        """Make a registered policy the champion, with `tags` that say why; returns its number.

        `over` is the champion that it was compared with, by number; None where there was none. The champion before it
        gets the tag `champion_until`; a call that was cut off is made good by another. Raises NotPromoted when another
        call is at it, or has moved the champion since.
        """
        number = next(one.number for one in reversed(self.versions()) if one.is_policy(policy))
        with self._alone(number):
            if (now_champion := self.aliases().get(CHAMPION)) != over:
                raise _overtaken(f"the champion of {self._name} is version {now_champion} by now, not {over}")
            self._make_champion(number, tags)
        return number

    @contextmanager
    def _alone(self, number: int) -> Iterator[None]:
        """Nobody else moves the champion meanwhile.

        MLflow moves an alias whatever it was before, and has no locks: so each call first tags its version and then
        looks for other versions with that tag. Of two calls at once the later look sees both tags, so that one of them
        goes on at most. The tag of a call that was killed counts for a minute, by the clocks of both hosts.
        """
        self._tag(number, PROMOTING, datetime.now(UTC).isoformat())
        try:
            others = [one for one in self.versions() if one.number != number and _is_recent(one.tags.get(PROMOTING))]
            if others:
                raise _overtaken(f"another `raylign promote` is making version {others[0].number} its champion")
            yield
        finally:
            self._ask(lambda: self._client.delete_model_version_tag(self._name, str(number), PROMOTING))

    def _make_champion(self, number: int, tags: Mapping[str, str]) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for key, value in {**tags, SINCE: now}.items():
            self._tag(number, key, value)
        before = self.champion()
        if before is not None and before.number != number:
            self._tag(before.number, UNTIL, now)
        self._ask(lambda: self._client.delete_model_version_tag(self._name, str(number), UNTIL))
        self._point(CHAMPION, number)

    def aliases(self) -> dict[str, int]:
        """Numbers of versions by their alias."""
        found = self._ask(lambda: self._client.get_registered_model(self._name).aliases)
        return {alias: int(number) for alias, number in found.items()}

    def _make(self) -> None:
        try:
            self._ask(lambda: self._client.get_registered_model(self._name))
        except TrackingError as error:
            if _code(error) != _UNKNOWN:
                raise
        else:
            return
        try:
            self._ask(lambda: self._client.create_registered_model(self._name, description=_ABOUT))
        except TrackingError as error:
            if _code(error) != _TAKEN:
                raise

    def _point(self, alias: str, number: int) -> None:
        if self.aliases().get(alias) != number:
            self._ask(lambda: self._client.set_registered_model_alias(self._name, alias, str(number)))

    def _tag(self, number: int, key: str, value: str) -> None:
        self._ask(lambda: self._client.set_model_version_tag(self._name, str(number), key, value))


def _is_recent(time: str | None) -> bool:
    try:
        return time is not None and datetime.now(UTC) - datetime.fromisoformat(time) < _AT_IT
    except (ValueError, TypeError):
        return False


def _overtaken(found: str) -> NotPromoted:
    error = NotPromoted(found)
    error.cure = "run the same command again: it compares with whoever is the champion then"
    return error


def _code(error: TrackingError) -> str | None:
    cause = error.__cause__
    return cause.error_code if isinstance(cause, MlflowException) else None
