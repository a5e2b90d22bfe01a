"""Errors a person can act on: each message gives the value, the limit and the cure."""

from pathlib import Path


class RaylignError(Exception):
    """Base of every error raylign raises on purpose; the CLI prints it without a traceback."""

    cure: str = ""
    """What to do, where the message does not say it; shown on a line of its own."""
    rest: Path | None = None
    """The file with everything that is known of it, where other libraries' errors stand behind it."""


class ConfigError(RaylignError):
    """The recipe or an override is wrong; nothing has started."""


class ModelError(RaylignError):
    """The model path cannot be resolved or loaded."""


class PromptError(RaylignError):
    """A prompt source is missing, empty or malformed; names the row."""


class DataError(RaylignError):
    """Judged text is missing, empty or malformed; names the row."""


class ScorerError(RaylignError):
    """The scorer cannot be loaded, or left more items unscored than allowed."""


class NoPreferencesError(RaylignError):
    """A round gave no pair to train on; says why every group was dropped."""


class PlacementError(RaylignError):
    """The cluster has less than the roles need; says required and available."""


class WeightSyncError(RaylignError):
    """A weight push was refused or could not be verified."""


class TrainerError(RaylignError):
    """The trainer group cannot start or continue."""


class GeneratorError(RaylignError):
    """A generator failed and its prompts cannot be completed."""


class ActorsLost(RaylignError):
    """Actors died or stopped answering; they can be replaced."""


class UnexpectedError(RaylignError):
    """An error of Python or of another library that nothing has foreseen."""


class RecordError(RaylignError):
    """A file of a run is not what a run writes; names the file and what is wrong in it."""


class DiskError(RaylignError):
    """The run directory cannot be written; what was finished before is safe."""


class ServerError(RaylignError):
    """A server's answer is larger than allowed, or in an encoding that was not asked for."""


class ServerAway(ServerError):
    """A server cannot be reached, or does not speak HTTP."""


class ServerLate(ServerError):
    """A server's whole answer was not there in time."""


class TrackingError(RaylignError):
    """MLflow is away, refuses what it is sent, or answers what cannot be understood."""

    passing: bool = True
    """Whether waiting may help."""


class NotPromoted(RaylignError):
    """A policy version did not pass the gate; names each condition, its value and its limit."""


class Waiting(RaylignError):
    """Nothing is wrong: the run goes on, by the same command, once people have answered its questions."""
