"""The place of one actor, or of a group that only works together: whoever is lost there is replaced.

What generators, scorer and trainers have in common is here: how a loss is explained, counted and put on record, when a
replacement starts, and how long it is waited for.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from ray import ObjectRef
from ray.actor import ActorHandle

from actors.supervision.cures import Role
from actors.supervision.endings import Loss, ended, explains
from actors.supervision.incidents import Incidents
from actors.supervision.node_memory import Pause
from actors.supervision.processes import dump_stacks, kill, process_of
from raylign.errors import RaylignError

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Supervision:
    """How losses of a role are told and recorded. `stacks` is the folder for stacks of actors that hang."""

    role: Role
    error: type[RaylignError]
    incidents: Incidents
    stacks: Path


@dataclass(frozen=True, slots=True)
class Starting:
    """An actor that loads: the call that answers once it has, and until when (monotonic seconds) it is waited for."""

    ready: ObjectRef[Any]
    deadline: float

    @property
    def on_time(self) -> bool:
        return time.monotonic() < self.deadline


class Slot(Generic[A]):
    """`names` are those of the actors, for their stacks; the slot's own is in messages and records."""

    def __init__(self, supervision: Supervision, name: str, names: Sequence[str]) -> None:
        self.name = name
        self.handles: tuple[ActorHandle[A], ...] = ()
        self.pause: Pause | None = None
        """What a replacement waits for before it is started."""
        self.starting: Starting | None = None
        self._supervision, self._names = supervision, names

    @property
    def is_ready(self) -> bool:
        """Whether an actor is there that has loaded."""
        return self.pause is None and self.starting is None

    def fill(self, handles: Sequence[ActorHandle[A]], starting: Starting | None = None) -> None:
        """Actors have been started."""
        self.handles, self.starting, self.pause = tuple(handles), starting, None

    def diagnosed(self, loss: Loss) -> Loss:
        """With the places of their stacks where actors hang."""
        if loss.kind != "silent":
            return loss
        named = zip(self.handles, self._names, strict=True)
        return replace(
            loss,
            cause="; ".join(
                [loss.cause, *(dump_stacks(handle, self._supervision.stacks, name) for handle, name in named)]
            ),
        )

    def lost(self, loss: Loss) -> Pause:
        """Record the loss and end what is left. Raises the role's error past the cap of restarts."""
        role, error = self._supervision.role, self._supervision.error
        self.pause = self._supervision.incidents.lost(role, self.name, loss, error, self._node_of(loss))
        self.starting = None
        kill(self.handles)
        return self.pause

    def _node_of(self, loss: Loss) -> str:
        """The node of the process that died."""
        if loss.kind != "process":
            return ""
        dead = [handle for handle in self.handles if len(self.handles) == 1 or ended(handle)]
        return process_of(dead[0]).node if dead else ""

    def loss(self) -> Loss | None:
        """Of an actor that is dead, the one that explains the others."""
        return min((loss for handle in self.handles if (loss := ended(handle))), key=explains, default=None)

    def wait_for_room(self, sleep: Callable[[float], None]) -> None:
        """Return once a replacement may start; raises the role's error when its node has had no room for too long."""
        if self.pause is not None:
            self.pause.wait(sleep, self.late)

    def late(self) -> RaylignError:
        """For a replacement that has waited too long for room."""
        return self._supervision.incidents.late(self._supervision.role, self.name, self._supervision.error)

    def recovered(self) -> None:
        """Record that the replacement is at work."""
        self._supervision.incidents.recovered(self._supervision.role, self.name)
