"""Long sequences in parts."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in order, `size` at a time; the last part may be shorter."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
