"""How actors end: every way in which Ray says so, and which of them a replacement puts right."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import ray
from ray._private import state
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    TaskCancelledError,
    WorkerCrashedError,
)

from raylign.errors import ActorsLost, RaylignError

Kind = Literal["memory", "node", "process", "start", "silent"]
"""What took the actor: its node's lack of memory, its node, the end of its process, its own constructor; or nobody
knows, since it did not answer. In this order one explains the others."""
_GB = 1e9
_SHOWN = 300
_NODE_DIED = "its node has died"
_UNPICKLED = re.compile(r"Exception ray\.exceptions\.((?:Actor\w+|OutOfMemory|NodeDied)Error) isn't serializable")
_SHORT = "node running low on memory"
_GIB = re.compile(r"was ([\d.]+)GB used / ([\d.]+)GB limit")
_NODE = re.compile(r"Memory on the node \(IP: [^,]*, ID: ([0-9a-f]+)\)")
_THRESHOLD = re.compile(r"Memory usage (\d+)B exceeded threshold of (\d+)B[^\n]*? of (\d+)B limit")
_ACTOR = re.compile(r"(Selected to kill: )?\(?Actor\(([0-9a-f]+)\):[^\n]*?actual memory used=([\d.]+)GB")
_RAISED = re.compile(r"^(?:[\w.]+\.)?(\w+)(: |$)")


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What Ray's memory monitor wrote when it ended workers of a node, in bytes. `node_memory` reads it."""

    node: str
    used: float
    limit: float
    threshold: float
    """Use of the node above which Ray ends workers."""
    held: Mapping[str, float]
    """Main memory of each actor that Ray might have ended, by its id; children of theirs are not in it."""
    ended: frozenset[str]

    def ours(self, job: str) -> float:
        """What the actors of the job held; an actor's id ends with its job's."""
        return sum(amount for actor, amount in self.held.items() if actor.endswith(job))

    def wanted(self, job: str) -> float:
        """What those held that were ended, and will be asked for again."""
        return sum(self.held[actor] for actor in self.ended if actor.endswith(job))


@dataclass(frozen=True, slots=True)
class Loss:
    """An actor that is gone, in one line. Made here, read by whoever replaces it."""

    kind: Kind
    cause: str
    report: MemoryReport | None = None


def ending(error: RayError) -> Loss | None:
    """How the actor ended that was asked; None where a replacement would not help: the code failed, or the cluster."""
    if isinstance(error, RayTaskError):
        return _needed(error.cause)
    if isinstance(error, OutOfMemoryError):
        return _memory_loss(str(error))
    if isinstance(error, RuntimeEnvSetupError):
        return Loss("start", f"its environment could not be set up: {one_line(error.error_message or '')}")
    if isinstance(error, RayActorError):
        return _actor_loss(error)
    if isinstance(error, NodeDiedError | ObjectLostError):
        return Loss("node", f"its node is gone ({first_line(str(error))})")
    if isinstance(error, WorkerCrashedError | TaskCancelledError):
        return Loss("process", f"its process ended ({first_line(str(error))})")
    return None


def _needed(cause: object) -> Loss | None:
    """For a call that failed because another actor was gone; Ray cannot pickle every error of its own."""
    if isinstance(cause, RayError) and not isinstance(cause, RayTaskError):
        found = ending(cause)
        name = _UNPICKLED.match(str(cause)) if type(cause) is RayError else None
        if found or name:
            told = found.cause if found else name[1] if name else ""
            return Loss("process", f"an actor that it needs is gone ({told})", found.report if found else None)
    return None


def _actor_loss(error: RayActorError) -> Loss:
    text = error.error_msg
    if error.actor_init_failed:
        return Loss("start", raised_in(text))
    if error.preempted:
        return Loss("node", "the actor died: its node was taken away (preempted)")
    if isinstance(error, ActorUnavailableError):
        return Loss("process", f"the actor cannot be reached ({first_line(text)})")
    if _SHORT in text:
        return _memory_loss(text)
    if _NODE_DIED in text:
        reason = re.search(r"the actor's node was ([^:\n]*)", text)
        return Loss("node", f"the actor died: its node is gone{f' ({reason[1]})' if reason else ''}")
    return Loss("process", f"the actor died ({_why(text)})")


def _why(text: str) -> str:
    """Ray's reason, which stands below a sentence that is always the same and a table of ids."""
    head, *rest = [line for line in text.splitlines() if line.strip()] or ["no reason given"]
    told = [line for line in rest if not line.startswith("\t")]
    return first_line(told[0] if head == ActorDiedError.BASE_ERROR_MSG and told else head)


def _memory_loss(text: str) -> Loss:
    report = memory_report(text)
    if report is None:
        return Loss("memory", f"Ray's memory monitor ended it ({first_line(text)})")
    ours = report.ours(own_job())
    return Loss(
        "memory",
        f"Ray's memory monitor ended it: {report.used / _GB:.1f} of {report.limit / _GB:.1f} GB of its node were in "
        f"use (limit {report.threshold / _GB:.1f}), {ours / _GB:.1f} GB by this run",
        report,
    )


def memory_report(text: str) -> MemoryReport | None:
    """The figures in Ray's report; None when it is not written as it is known to be."""
    node, amounts, threshold = _NODE.search(text), _GIB.search(text), _THRESHOLD.search(text)
    if node is None or amounts is None or threshold is None:
        return None
    actors = _ACTOR.findall(text)
    return MemoryReport(
        node=node[1],
        used=float(threshold[1]),
        limit=float(threshold[3]),
        threshold=float(threshold[2]),
        held={actor: float(amount) * (1 << 30) for _, actor, amount in actors},
        ended=frozenset(actor for chosen, actor, _ in actors if chosen),
    )


def own_job() -> str:
    """The id of this driver's job; the end of its actors' ids."""
    return ray.get_runtime_context().get_job_id() if ray.is_initialized() else ""


def explains(loss: Loss) -> int:
    """Smallest for the loss that explains others of the same moment."""
    return get_args(Kind).index(loss.kind)


def loss_of(lost: ActorsLost) -> Loss:
    """What `actors.supervision.watch` found to be gone."""
    cause = lost.__cause__
    found = ending(cause) if isinstance(cause, RayError) else None
    if found is None:
        return Loss("silent" if cause is None else "process", str(lost))
    return Loss(found.kind, str(lost), found.report)


def ended(handle: ActorHandle[Any]) -> Loss | None:
    """How an actor that nobody has asked ended, as Ray's control service has it; None while it lives."""
    known: dict[str, Any] = state.actors(handle._actor_id.hex()) or {}
    if known.get("State") != "DEAD":
        return None
    cause = known.get("DeathCause")
    if cause is not None and cause.HasField("oom_context"):
        return _memory_loss(cause.oom_context.error_message)
    told = cause.actor_died_error_context.error_message if cause is not None else ""
    kind: Kind = "node" if _NODE_DIED in told else "process"
    return Loss(kind, f"its {kind} is gone ({first_line(told)})" if told else f"its {kind} is gone")


def raised_in(text: str) -> str:
    """`Type: message` of the exception at the end of a traceback, in one line; of our own errors the message."""
    lines = text.splitlines()
    frames = [index for index, line in enumerate(lines) if line.startswith('  File "')]
    rest = lines[frames[-1] + 1 :] if frames else lines[-1:]
    while rest and (rest[0].startswith("    ") or not rest[0].strip()):
        rest = rest[1:]
    told = " ".join(" ".join(rest or lines[-1:]).split())
    name = _RAISED.match(told)
    if name is None:
        return cut(told)
    ours = any(name[1] == kind.__name__ for kind in _kinds(RaylignError))
    return cut(told[name.end() :] if ours and name[2] else f"{name[1]}{told[name.end(1) :]}")


def _kinds(kind: type[RaylignError]) -> list[type[RaylignError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in _kinds(below))]


def first_line(text: str) -> str:
    """What is left of a text of Ray's on a console."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return cut(lines[0]) if lines else "no reason given"


def one_line(text: str) -> str:
    return cut(" ".join(text.split()))


def cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
