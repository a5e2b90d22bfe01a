"""Config and facts as flat strings that are safe to publish."""

import json
from collections.abc import Mapping
from typing import Any

from raylign.boundary.secrets import REDACTED, names_secret, without_secrets


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
    """`tree` flattened to strings: secrets redacted by name and by looks."""
    return {key: REDACTED if _hides(key, value) else _text(value) for key, value in flatten(tree).items()}


def redacted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` in its own shape, with the same values withheld as by `publishable`."""
    return {key: _redacted(key, value) for key, value in tree.items()}


def _redacted(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _redacted(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(name, item) for item in value]
    if _hides(name, value):
        return REDACTED
    return without_secrets(value) if isinstance(value, str) else value


def _hides(name: str, value: Any) -> bool:
    return value is not None and not isinstance(value, bool) and names_secret(name)


def _text(value: Any) -> str:
    return without_secrets(value if isinstance(value, str) else json.dumps(value))
