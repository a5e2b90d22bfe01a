"""Stand-ins for Ray where only one trainer rank is driven: what importing `actors.trainer.rank` asks of it, no more."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ActorHandle(Generic[T]):
    """Nobody has one here."""


class ObjectRef(Generic[T]):
    """Nobody has one here."""


class RayError(Exception):
    """Nothing here raises it."""


class NodeAffinitySchedulingStrategy:
    """No task is placed here."""


def remote(kind: Any) -> Any:
    """A class stays what it is."""
    return kind


def get_node_ip_address() -> str:
    """Both ends of the process group are on this machine."""
    return "127.0.0.1"


_NAMES: dict[str, dict[str, Any]] = {
    "ray": {"remote": remote, "ObjectRef": ObjectRef},
    "ray._private": {"state": None},
    "ray.actor": {"ActorHandle": ActorHandle},
    "ray.exceptions": {"RayError": RayError},
    "ray.util": {"get_node_ip_address": get_node_ip_address},
    "ray.util.scheduling_strategies": {"NodeAffinitySchedulingStrategy": NodeAffinitySchedulingStrategy},
}


def without_ray() -> None:
    """From now on this process imports the stand-ins. Call it before anything of `actors` is imported."""
    for name, values in _NAMES.items():
        module = ModuleType(name)
        # Libraries ask whether Ray is installed by its spec.
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(values)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            vars(sys.modules[parent])[child] = module
