"""Calls of actors: a method of the actor's Protocol is passed, not its name, so that mypy knows what may be asked.

An actor's class is made from its Protocol too: drivers and tests import neither its implementation nor its libraries.
"""

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable
from importlib import import_module
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")


@overload
def ask(
    handle: ActorHandle[A],
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> ObjectRef[T]: ...
@overload
def ask(
    handle: ActorHandle[A], method: Callable[Concatenate[A, P], T], *args: P.args, **kwargs: P.kwargs
) -> ObjectRef[T]: ...
def ask(handle: ActorHandle[A], method: Callable[..., Any], *args: Any, **kwargs: Any) -> ObjectRef[Any]:
    """Call `method` of the actor, without waiting for its answer."""
    called: ObjectRef[Any] = getattr(handle, method.__name__).remote(*args, **kwargs)
    return called


@overload
def ask_all(
    handles: Iterable[ActorHandle[A]],
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> list[ObjectRef[T]]: ...
@overload
def ask_all(
    handles: Iterable[ActorHandle[A]], method: Callable[Concatenate[A, P], T], *args: P.args, **kwargs: P.kwargs
) -> list[ObjectRef[T]]: ...
def ask_all(
    handles: Iterable[ActorHandle[A]], method: Callable[..., Any], *args: Any, **kwargs: Any
) -> list[ObjectRef[Any]]:
    """Call `method` of every actor. Lists of rows and the like are sent once, not once an actor."""
    shared = [ray.put(argument) if isinstance(argument, list | tuple) else argument for argument in args]
    return [ask(handle, method, *shared, **kwargs) for handle in handles]


def actor_class(role: type, implementation: str) -> Any:
    """Ray's actor class with the methods of the Protocol `role`.

    `implementation` (`module:Class`) is imported where the actor starts, and takes the arguments of its start.
    """

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        module, _, name = implementation.partition(":")
        self.implementation = getattr(import_module(module), name)(*args, **kwargs)

    methods = {name: _forwarded(method) for name, method in inspect.getmembers(role, inspect.isfunction)}
    public = {name: method for name, method in methods.items() if not name.startswith("_")}
    return ray.remote(type(role.__name__, (), {"__init__": start, "__doc__": role.__doc__, **public}))


def _forwarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same method of the implementation."""
    name = method.__name__
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def call_async(self: Any, *args: Any, **kwargs: Any) -> Any:
            return await getattr(self.implementation, name)(*args, **kwargs)

        return call_async

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.implementation, name)(*args, **kwargs)

    return call
