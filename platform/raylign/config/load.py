"""YAML and dotted overrides in, a checked tree out, and back."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, overload

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from raylign.boundary.code import NAMED, import_named
from raylign.config.base import Block
from raylign.config.evaluate import EvaluateConfig
from raylign.config.offline import OfflineDpoConfig, RewardModelConfig, SftConfig
from raylign.config.online import OnlineDpoConfig
from raylign.config.tree import RunConfig
from raylign.errors import ConfigError
from raylign.reading import Refused, shown
from raylign.reading.files import read_text
from raylign.reading.yaml_text import LONGEST_YAML, parse_yaml
from raylign.report.text import one_line

RECIPES: Mapping[str, type[RunConfig]] = {
    "online_dpo": OnlineDpoConfig,
    "offline_dpo": OfflineDpoConfig,
    "sft": SftConfig,
    "reward_model": RewardModelConfig,
    "evaluate": EvaluateConfig,
}
"""The tree of each `recipe`, which is the name of its script in `recipes/` too."""
_DEFAULT = "online_dpo"
_MOST_PARTS = 16
"""Of the name of a setting; the longest has six."""
_LONGEST_KEY, _MOST_TOLD = 80, 20
"""Characters of a key, and problems, in a message."""
Tree = TypeVar("Tree", bound=Block)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe of any kind, which its key `recipe` names, and apply `block.key=value` overrides.

    Raises ConfigError naming each wrong key.
    """
    raw = overridden(_read_yaml(path), overrides)
    name = raw.get("recipe", _DEFAULT)
    if isinstance(name, str) and NAMED.fullmatch(name):
        kind: type[RunConfig] = import_recipe(name).config
        return parse_tree(raw, kind, str(path))
    if not isinstance(name, str) or name not in RECIPES:
        hint = _hint(str(name), list(RECIPES), "values")
        raise ConfigError(f"{path}: recipe: unknown value {shown(name)}; {hint}, or module:NAME of a recipe of yours")
    return parse_tree(raw, RECIPES[name], str(path))


def import_recipe(spec: str) -> Any:
    """The object `module:NAME`, which `recipes.recipe.Recipe` describes; its `config` is a kind of RunConfig.

    The module is of the working directory or an installed package; its code runs. Raises ConfigError.
    """
    recipe = import_named(spec, "recipe")
    kind = getattr(recipe, "config", None)
    if not (isinstance(kind, type) and issubclass(kind, RunConfig)):
        raise ConfigError(f"recipe={spec}: it is no recipe with a config; see recipes/recipe.py")
    return recipe


@overload
def load_config(path: Path, overrides: Sequence[str] = ()) -> OnlineDpoConfig: ...
@overload
def load_config(path: Path, overrides: Sequence[str] = (), *, kind: type[Tree]) -> Tree: ...
def load_config(path: Path, overrides: Sequence[str] = (), *, kind: type[Block] = OnlineDpoConfig) -> Block:
    """Read a recipe of `kind` and apply `block.key=value` overrides. Raises ConfigError naming each wrong key."""
    return parse_tree(overridden(_read_yaml(path), overrides), kind, str(path))


def parse_config(raw: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config") -> OnlineDpoConfig:
    """Check a raw mapping after overrides. Raises ConfigError naming each wrong key."""
    return parse_tree(overridden(raw, overrides), OnlineDpoConfig, where)


def overridden(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with `block.key=value` overrides in it."""
    tree: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    for override in overrides:
        _apply(tree, override)
    return tree


def parse_tree(raw: Mapping[str, Any], kind: type[Tree], where: str) -> Tree:
    """Check a raw mapping against `kind`. Raises ConfigError naming each wrong key."""
    try:
        return kind.model_validate(_with_default_kinds(raw, kind))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = [f"  {_describe(detail, kind)}" for detail in problems[:_MOST_TOLD]]
        lines += [f"  and {more} more; correct these first"] if (more := len(problems) - len(lines)) else []
        raise ConfigError(f"{where}: {len(problems)} problem(s)\n" + "\n".join(lines)) from error


def dump_config(config: Block) -> str:
    """The resolved config as YAML; loading it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = parse_yaml(read_text(path, LONGEST_YAML))
    except Refused as error:
        raise ConfigError(f"{path}: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the recipe ({error.strerror}); give the path of a .yaml file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8; give the path of a .yaml recipe") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of blocks, not a {type(raw).__name__}; begin with `run:`")
    return raw


def _apply(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {shown(override)} is not of the form block.key=value; correct it")
    if len(keys) > _MOST_PARTS:
        raise ConfigError(f"override {shown(override)}: a name of {len(keys)} parts; no setting has one, correct it")
    node = tree
    for key in keys[:-1]:
        child = node.get(key)
        node[key] = dict(child) if isinstance(child, Mapping) else {}
        node = node[key]
    try:
        node[keys[-1]] = parse_yaml(text)
    except Refused as error:
        raise ConfigError(f"override {shown(override)}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"override {shown(override)}: value is not valid YAML; quote it") from error


def _with_default_kinds(raw: Mapping[str, Any], kind: type[Block]) -> dict[str, Any]:
    """A block that is one of several kinds and does not say which is of the default kind."""
    tree = dict(raw)
    for name, field in kind.model_fields.items():
        if isinstance(field.discriminator, str) and isinstance(tree.get(name), dict):
            tree[name] = {field.discriminator: getattr(field.default, field.discriminator)} | tree[name]
    return tree


def _describe(detail: ErrorDetails, tree: type[Block]) -> str:
    keys, _ = _place(detail["loc"], tree)
    location = ".".join(one_line(key, _LONGEST_KEY) for key in keys)
    match detail["type"]:
        case "extra_forbidden":
            known = _known_keys(detail["loc"][:-1], tree)
            return f"{location}: unknown key; {_hint(str(detail['loc'][-1]), known, 'keys')}"
        case "union_tag_invalid":
            kinds = _quoted(detail["ctx"]["expected_tags"])
            name, tag = _quoted(detail["ctx"]["discriminator"])[0], detail["ctx"]["tag"]
            return f"{location}.{name}: unknown value {shown(tag)}; {_hint(tag, kinds, 'values')}"
        case "union_tag_not_found":
            name = _quoted(detail["ctx"]["discriminator"])[0]
            return f"{location}.{name}: Field required (got {shown(detail['input'])})"
        case "value_error":
            # Rules of ours name the value themselves, without what must stay secret.
            message = detail["msg"].removeprefix("Value error, ")
            return f"{location}: {message}" if location else message
    return f"{location}: {detail['msg']} (got {shown(detail['input'])})"


def _hint(wrong: str, known: Sequence[str], what: str) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known {what}: {', '.join(known)}"


def _quoted(text: str) -> list[str]:
    """pydantic's list of names: "'ipo', 'hinge'"."""
    return [name.strip("'") for name in text.split(", ")]


def _known_keys(location: Sequence[int | str], tree: type[Block]) -> list[str]:
    """Field names of the block at `location`."""
    _, blocks = _place(location, tree)
    return list(blocks[0].model_fields) if blocks else []


def _place(location: Sequence[int | str], tree: type[Block]) -> tuple[list[str], list[type[BaseModel]]]:
    """Keys as recipes write them, and the blocks that may stand there.

    Where a block is one of several kinds, pydantic puts the kind behind its name (loss.ipo.beta); recipes do not.
    """
    keys: list[str] = []
    blocks: list[type[BaseModel]] = [tree]
    name_follows = False
    for part in map(str, location):
        if name_follows:
            # A name of the user's may be that of a kind.
            keys.append(part)
            name_follows = False
            continue
        fields = [block.model_fields[part] for block in blocks if part in block.model_fields]
        of_kind = [block for block in blocks if part in _kinds(block)]
        if of_kind and (len(blocks) > 1 or not fields):
            blocks = of_kind
            continue
        keys.append(part)
        if fields:
            options = [option for field in fields for option in _members(field.annotation)]
            blocks = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
            name_follows = any(get_origin(field.annotation) is Mapping for field in fields)
    return keys, blocks


def _members(annotation: Any) -> list[Any]:
    """A type, or the types it is made of."""
    parts = get_args(annotation)
    return [annotation] if not parts else [member for part in parts for member in _members(part)]


def _kinds(block: type[BaseModel]) -> set[Any]:
    """What the block's discriminator may be."""
    return {
        kind
        for name in ("loss_type", "policy", "type", "action")
        if name in block.model_fields
        for kind in _members(block.model_fields[name].annotation)
    }
