"""Faults for a campaign at work: which there are, how each is injected, and how the journal tells of its end."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from raylign.tracking.journal import Event, read_events

KILLED = {
    "generator killed": ("generator", "ray::Generator", 4),
    "engine core killed": ("generator", "VLLM::EngineCore", 4),
    "trainer rank killed": ("trainer", "ray::TrainerRank", 4),
    "scorer killed": ("scorer", "ray::ScorerProcess", 4),
}
"""Name: role in the journal, title of the process, how often beside the others."""
DRIVER, SLOW, OUTAGE = "driver killed", "scorer slow", "MLflow away"
WEIGHTS = {**{name: weight for name, (_, _, weight) in KILLED.items()}, SLOW: 4, OUTAGE: 3, DRIVER: 1}


@dataclass
class Injected:
    """One fault. Seconds are counted from `at` (epoch seconds)."""

    name: str
    at: float
    detected_s: list[float] = field(default_factory=list)
    recovered_s: list[float] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return bool(self.recovered_s)


class Chaos:
    """Injects one fault after another, at most one of a role at a time, and follows each to its end."""

    def __init__(self, seed: int, every_s: float) -> None:
        self._random, self._every_s = random.Random(seed), every_s
        self._next = 0.0
        self.injected: list[Injected] = []

    def begin(self) -> None:
        """The campaign is at work (again): the next fault comes after the usual while."""
        self._next = time.time() + self._random.expovariate(1 / self._every_s)

    def due(self) -> list[str]:
        """The fault to inject now, if it is time for one."""
        if time.time() < self._next:
            return []
        self.begin()
        busy = {_role(fault.name) for fault in self.injected if not fault.over}
        free = {name: weight for name, weight in WEIGHTS.items() if _role(name) not in busy}
        return self._random.choices(list(free), list(free.values())) if free else []

    def inject(self, name: str, act: Callable[[], bool]) -> None:
        """`act` says whether there was anything to harm."""
        moment = time.time()
        if act():
            self.injected.append(Injected(name, moment))

    def follow(self, journal: Path) -> None:
        """What the journal tells of the faults that are not over."""
        events = list(read_events(journal)) if journal.is_file() else []
        for fault in (fault for fault in self.injected if not fault.over):
            if fault.name in KILLED:
                _follow_loss(fault, KILLED[fault.name][0], events)
            elif fault.name == DRIVER:
                self._restarted(fault, [e.time for e in events if e.time > fault.at and _is_work(e)][:1])

    def _restarted(self, driver: Injected, again: Sequence[float]) -> None:
        """A new driver brings new actors: with it the faults before are over, noticed or not."""
        for moment in again:
            for fault in self.injected:
                if not fault.over and fault.at <= driver.at and (fault is driver or fault.name in KILLED):
                    fault.recovered_s.append(moment - fault.at)

    def end(self, name: str, seconds: float) -> None:
        """The fault `name` that is not over took `seconds`."""
        for fault in (fault for fault in self.injected if fault.name == name and not fault.over):
            fault.recovered_s.append(seconds)


def kill_one(driver: int, title: str, choice: random.Random) -> bool:
    """kill -9 of one process of that title in the driver's family; False when there is none."""
    victims = [process for process in family_of(driver) if _title(process).startswith(title)]
    if victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(choice.choice(victims).pid, signal.SIGKILL)
    return bool(victims)


def family_of(driver: int) -> Sequence[psutil.Process]:
    try:
        found: Sequence[psutil.Process] = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return ()
    return found


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _role(name: str) -> str:
    return KILLED[name][0] if name in KILLED else name


def _is_work(event: Event) -> bool:
    return event.name in ("round_started", "stage", "step", "evaluation")


def _follow_loss(fault: Injected, role: str, events: Sequence[Event]) -> None:
    own = [e for e in events if e.name == "incident" and e.payload["role"] == role and e.time > fault.at]
    fault.detected_s = [e.time - fault.at for e in own if e.payload["happened"] == "lost"][:1]
    fault.recovered_s = [e.time - fault.at for e in own if e.payload["happened"] == "recovered"][:1]
