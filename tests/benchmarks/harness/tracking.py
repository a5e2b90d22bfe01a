"""What `tracking_overhead` asks of its contestant and gets back."""

from enum import StrEnum

from raylign.config.base import Block


class Server(StrEnum):
    """What the journal is fed to while the loop trains."""

    NONE = "journal alone"
    AGAIN = "journal alone, again"
    HEALTHY = "healthy server"
    KILLED = "server killed"
    SLOW = "slow server"


class TrackingJob(Block):
    """`repeats` times, one block of `steps` optimizer steps of about `step_s` seconds against each server, in turn."""

    repeats: int
    steps: int
    step_s: float
    delay_s: float
    """What the slow server holds every answer back for."""


class TrackedBlock(Block):
    """Of every step with its journal event: seconds by the clock, and those of them in which its thread computed, and
    in which it was ready but had no core. `feed_cpu_s`: CPU seconds of all other threads of the process."""

    server: Server
    repeat: int
    steps_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    waits_s: tuple[float, ...]
    appends_s: tuple[float, ...]
    """Of the event alone, by the clock."""
    feed_cpu_s: float
    events: int
    missing: int
    """Events that had not reached MLflow when the block ended."""
    traces: int
    """Requests for traces while the steps were taken."""


class TrackingResult(Block):
    blocks: tuple[TrackedBlock, ...]
