"""Config and facts as flat strings that are safe to publish."""

import json
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
_SECRET_WORDS = frozenset(
    {"token", "key", "secret", "password", "passwd", "passphrase", "authorization", "apikey"}
    | {"credential", "credentials"}
)
_SECRET_LENGTH = 6
"""Shorter values of variables are words that stand in any text."""
_WORD_BREAK = re.compile(r"[._\-/\s]+|(?<=[a-z0-9])(?=[A-Z])")
_USERINFO = re.compile(r"(?<=://)[^/\s]*@")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one level with dotted keys; lists that hold mappings get their index as a key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat.update({f"{key}.{inner}": item for inner, item in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def publishable(tree: Mapping[str, Any]) -> dict[str, str]:
    """`tree` flattened to strings: secrets redacted by name, credentials cut out of URIs."""
    return {key: REDACTED if _hides(key, value) else _text(value) for key, value in flatten(tree).items()}


def redacted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` in its own shape, with the same values withheld as by `publishable`."""
    return {key: _redacted(key, value) for key, value in tree.items()}


def without_credentials(text: str) -> str:
    """`text` with the `user:password@` of every URI in it removed."""
    return _USERINFO.sub("", text)


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """`text` without credentials in URIs and without the values of variables that are secrets by their name."""
    values = {value for name, value in environment.items() if names_secret(name) and len(value) >= _SECRET_LENGTH}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, REDACTED)
    return without_credentials(text)


def _redacted(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _redacted(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(name, item) for item in value]
    if _hides(name, value):
        return REDACTED
    return without_credentials(value) if isinstance(value, str) else value


def names_secret(name: str) -> bool:
    """Whether `name` is a secret's: it has a whole word such as `token`, which `max_new_tokens` has not.

    An option `..._env` holds no secret but the name of the variable with it.
    """
    return not name.endswith("_env") and bool({word.lower() for word in _WORD_BREAK.split(name)} & _SECRET_WORDS)


def _hides(name: str, value: Any) -> bool:
    return value is not None and not isinstance(value, bool) and names_secret(name)


def _text(value: Any) -> str:
    return without_credentials(value if isinstance(value, str) else json.dumps(value))
