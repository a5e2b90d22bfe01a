"""1..N generators behind one port."""

from collections.abc import Sequence
from typing import Any

from ray.actor import ActorHandle

from actors.supervision.waiting import get_together
from raylign.errors import GeneratorError


class GeneratorPool:
    """All generators serve the same policy version between publishes."""

    def __init__(self, handles: Sequence[ActorHandle[Any]]) -> None:
        self.handles = tuple(handles)
        self.served = 0
        """The policy version that was published last, or is being published."""
        self.pushed = False
        """Whether weights were ever sent; until then every generator serves what it has loaded."""

    def call(self, method: str, *args: object, timeout_s: float, what: str) -> list[Any]:
        """Call `method` on every generator at once; results in generator order.

        Raises ActorsLost when one has died or does not answer, GeneratorError when one raised.
        """
        refs = [getattr(handle, method).remote(*args) for handle in self.handles]
        return get_together(refs, timeout_s, what, GeneratorError)
