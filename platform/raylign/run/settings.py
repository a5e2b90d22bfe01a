"""`config.yaml` of a run: a file that was cut, emptied or changed by hand is noticed, instead of taken for defaults."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from raylign.config import RunConfig, dump_config, load_recipe
from raylign.errors import ConfigError

CONFIG_NAME = "config.yaml"
_MARK = b"# sha256 of the lines below: "


def settings_text(config: RunConfig) -> str:
    """The file's text: the sha256 of the config, then the config."""
    text = dump_config(config)
    return f"{_MARK.decode()}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def read_settings(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in the file, after `overrides` (KEY=VALUE). Files of earlier versions have no first line to compare.

    Raises ConfigError when the file is empty, or not what its first line says.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _not_written(path, f"it cannot be read ({error.strerror})") from error
    first, _, rest = content.partition(b"\n")
    if not (rest if first.startswith(b"#") else content).strip():
        raise _not_written(path, "it is empty")
    if first.startswith(_MARK) and hashlib.sha256(rest).hexdigest().encode() != first.removeprefix(_MARK).strip():
        raise _not_written(path, "it was cut or changed since, as its first line tells")
    return load_recipe(path, overrides)


def _not_written(path: Path, problem: str) -> ConfigError:
    error = ConfigError(f"{path} is not what the run has written: {problem}")
    error.cure = (
        "restore it from a copy; to change settings on purpose use `raylign resume RUN KEY=VALUE ...`, or take its "
        "first line out if you know that the rest is right"
    )
    return error
