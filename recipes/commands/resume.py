"""Go on with a run, if need be with other settings."""

from collections.abc import Sequence
from pathlib import Path

from raylign.config import RunConfig
from raylign.errors import ConfigError
from raylign.run.directory import differences, open_run
from raylign.run.inputs import accept

FIXED = ("recipe", "run.name", "run.seed", "model.", "prompts.", "data.")
"""What the finished part of a run was made of."""


def resumed_config(run: Path, settings: Sequence[str], accepted: Sequence[str] = ()) -> RunConfig:
    """The config of the run directory `run` with `settings` (KEY=VALUE) in it, which are kept there too.

    The run may go on with what the inputs `accepted` are now. Raises ConfigError for a folder that is no run, and for
    settings and inputs that its rounds and checkpoints depend on.
    """
    directory = open_run(run)
    place = (f"run.dir={directory.path.parent}",)
    old, new = directory.config(place), directory.config((*settings, *place))
    changed = differences(old, new)
    if fixed := [line for line in changed if line.startswith(FIXED)]:
        raise ConfigError(
            f"{directory.path}: {fixed[0]}: what this run has done depends on that; start another run (run.name=...)"
        )
    if moved := [line for line in changed if line.startswith("reference.policy")]:
        raise ConfigError(
            f"{directory.path}: {moved[0]}: its checkpoints hold the former; start another run (run.name=...)"
        )
    if changed or accepted:
        with directory.locked():
            accept(directory.path, accepted)
            directory.write_config(new)
    return new
