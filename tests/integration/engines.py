"""Generators for tests. One process takes on one engine after another: importing vLLM is what takes time."""

from collections.abc import Sequence
from typing import Any, Protocol, Self

from ray.actor import ActorHandle

from actors.calls import actor_class, ask
from actors.generator.actor import EngineSpec
from actors.generator.engine_process import start_engine
from actors.supervision.processes import kill
from actors.supervision.watch import get_all
from raylign.errors import GeneratorError
from raylign.roles import Generator

_START_S = 1200.0


class _Reused(Generator, Protocol):
    async def become(self, spec: EngineSpec, name: str) -> None:
        """Start an engine; the one before has been shut down."""


class Process:
    """The implementation of `_Reused`: all but `become` is the engine's."""

    def __init__(self) -> None:
        self._engine: Generator | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def become(self, spec: EngineSpec, name: str) -> None:
        self._engine = start_engine(spec, name)


_Actor = actor_class(_Reused, "tests.integration.engines:Process")


class Engines:
    """In place of `actors.generator.actor.GeneratorActor` for one generator at a time."""

    def __init__(self) -> None:
        self._handle: ActorHandle[_Reused] | None = None
        self._taken = False

    def options(self, **_: Any) -> Self:
        return self

    def remote(self, spec: EngineSpec, name: str) -> ActorHandle[_Reused]:
        if self._handle is None or self._taken:  # a generator that is replaced is lost
            self._handle = _Actor.options(num_cpus=0).remote()
        self._taken = True
        get_all([ask(self._handle, _Reused.become, spec, name)], _START_S, "becoming a generator", GeneratorError)
        return self._handle

    def give_back(self, handles: Sequence[ActorHandle[Any]]) -> list[ActorHandle[Any]]:
        """The generator among `handles`, whose engine has been shut down, can be another; returns the others."""
        self._taken = self._taken and self._handle not in handles
        return [handle for handle in handles if handle != self._handle]

    def end(self) -> None:
        """Whoever asks for a generator next gets another."""
        kill([] if self._handle is None else [self._handle])
        self._handle, self._taken = None, False
