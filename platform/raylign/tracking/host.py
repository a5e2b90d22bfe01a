"""How busy the driver's host is while a run is at work, for the journal; MLflow gets it from there like all else."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from raylign.errors import DiskError
from raylign.tracking.tracker import Tracker

INTERVAL_S = 10.0
"""That of MLflow's own monitor."""
_MEGABYTE = 1e6


@contextmanager
def host_watched(tracker: Tracker, folder: Path) -> Iterator[None]:
    """Until its end, an event every ten seconds, from a thread of its own; `folder` is on the disk that counts."""
    ended = threading.Event()
    psutil.cpu_percent()  # the first call begins the time that the next one is the mean of
    thread = threading.Thread(target=_watch, args=(tracker, folder, ended), name="host-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(tracker: Tracker, folder: Path, ended: threading.Event) -> None:
    while not ended.wait(INTERVAL_S):
        try:
            tracker.system(host_metrics(folder))
        except (DiskError, FileNotFoundError):
            return  # whoever writes the next record says so


def host_metrics(folder: Path) -> Mapping[str, float]:
    """MLflow's names: percent of all cores since the last call, memory in use, and the disk of `folder`."""
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(folder))
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": round(memory.used / _MEGABYTE, 1),
        "system_memory_usage_percentage": round(100 * memory.used / memory.total, 1),
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": round(disk.free / _MEGABYTE, 1),
    }
