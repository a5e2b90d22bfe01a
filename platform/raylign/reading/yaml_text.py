"""YAML with one meaning: no key twice, no number that two versions of YAML read differently, no tags, no bombs."""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from raylign.reading.values import SHORTER, Refused, shown

LONGEST_YAML = 256 << 10
"""Characters of one text; the longest recipe has some thousand."""
_DEEPEST, _LARGEST = 32, 20_000
"""Levels, and values, those behind an alias counted wherever it stands."""
_INT, _FLOAT, _STR = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"
_IMPLICIT = frozenset((_INT, _FLOAT, _MERGE, "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"))
_PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)")
_DIGITS = 20
"""Of the largest integer of 64 bits."""


def parse_yaml(text: str) -> Any:
    """The value of one YAML document: null, booleans, numbers, text, and lists and mappings with keys of text.

    Dates stay text. Raises Refused, or YAMLError where it is no YAML.
    """
    if len(text) > LONGEST_YAML:
        raise Refused(f"longer than {LONGEST_YAML >> 10} KiB", "give a shorter text")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _Check().extent(root)
        return loader.construct_document(root)
    except Refused:
        raise
    except (ValueError, OverflowError) as error:
        # PyYAML lets through what Python says of an escape such as \UFFFFFFFF.
        raise yaml.YAMLError(str(error)) from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for few levels, without tags; what looks like a date is text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) not in (None, "!", _STR):
            raise ComposerError(None, None, f"the tag {shown(event.tag)} is not read; leave it out", event.start_mark)
        self._level += 1
        if self._level > _DEEPEST:
            raise _refused(f"nested more than {_DEEPEST} levels deep", "give it flatter", event)
        node = super().compose_node(parent, index)
        self._level -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _IMPLICIT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Check:
    """Looks at every node of a document once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}
        self._open: set[int] = set()

    def extent(self, node: Node) -> tuple[int, int]:
        """Values and levels of a node with all aliases written out. Raises Refused."""
        if id(node) in self._known:
            return self._known[id(node)]
        if id(node) in self._open:
            raise _refused("a value that holds itself", "write it out", node)
        self._open.add(id(node))
        inside: list[Node] = []
        if isinstance(node, ScalarNode):
            _check_number(node)
        elif isinstance(node, MappingNode):
            _check_keys(node)
            inside = [part for pair in node.value for part in pair]
        elif isinstance(node, SequenceNode):
            inside = node.value
        parts = [self.extent(part) for part in inside]
        self._open.discard(id(node))
        size, depth = 1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0)
        if size > _LARGEST or depth > _DEEPEST:
            raise _refused("more values than any recipe has, aliases written out", "write out what is meant", node)
        self._known[id(node)] = size, depth
        return size, depth


def _check_keys(node: MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.tag == _MERGE:
            continue
        if not isinstance(key, ScalarNode) or key.tag != _STR:
            name = shown(key.value) if isinstance(key, ScalarNode) else "of several parts"
            raise _refused(f"the key {name} is no text", "put it in quotes", key)
        if key.value in seen:
            raise _refused(f"the key {shown(key.value)} is there twice", "leave one of them", key)
        seen.add(key.value)


def _check_number(node: ScalarNode) -> None:
    is_odd_int = node.tag == _INT and not _PLAIN_INT.fullmatch(node.value)
    is_odd_float = node.tag == _FLOAT and (":" in node.value or "_" in node.value)
    if is_odd_int or is_odd_float:
        cure = "write it as a decimal number without leading zeros, colons and underscores, or in quotes as text"
        raise _refused(f"{shown(node.value)} is another number to another version of YAML", cure, node)
    if node.tag == _INT and len(node.value) > _DIGITS + 1:
        raise _refused(f"an integer of {len(node.value):,} digits", SHORTER, node)


def _refused(problem: str, cure: str, at: Any) -> Refused:
    return Refused(f"line {at.start_mark.line + 1}: {problem}", cure)
