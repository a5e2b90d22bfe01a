"""Scoring functions that forge, block or outlive; test_scoring_process.py runs them.

The prompt of every item is a folder, where they leave the process ids of what they started.
"""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

FORGED = 999.0
ANSWER = json.dumps({"answers": [[FORGED, "", {}, True]]}).encode()
FRAMES = (
    struct.pack(">i", len(ANSWER)) + ANSWER + b" " * 16,
    struct.pack(">I", len(ANSWER)) + bytes(16) + ANSWER,
    struct.pack(">I", len(ANSWER) + 1) + bytes(16) + b"+" + ANSWER,
)
"""As `multiprocessing` has them, as the scoring process has them, and as the relay has them; whole for all three."""
DAEMON = """
import os, sys, time
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
time.sleep(600)
"""
HYDRA = """
import os, sys, time
for _ in range(200):
    if os.fork():
        time.sleep(0.01)
        os._exit(0)
    os.setsid()
    open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
time.sleep(600)
"""

Prompts = list[list[dict[str, str]]]


def note(prompts: Prompts) -> Path:
    return Path(prompts[0][-1]["content"]) / "pids"


def write_everywhere(content: bytes) -> None:
    """Into every descriptor that a function may find."""
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(number, content)


def started(program: str, prompts: Prompts, least: int = 1) -> None:
    """Runs `program`, and waits until what it leaves behind has said who it is."""
    path = note(prompts)
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    while not path.exists() or len(path.read_text().splitlines()) < least:
        time.sleep(0.01)


def forking(prompts: Prompts, completions: list[str]) -> list[float]:
    if "fork" in completions and os.fork() == 0:
        note(prompts).write_text(f"{os.getpid()}\n")
        return [FORGED] * len(completions)
    while "fork" in completions and not note(prompts).exists():
        time.sleep(0.01)
    return [1.0] * len(completions)


def forging(prompts: Prompts, completions: list[str]) -> list[float]:
    for content in FRAMES:
        write_everywhere(content)
    return [1.0] * len(completions)


def promising(prompts: Prompts, completions: list[str]) -> list[float]:
    if "bad" in completions:
        write_everywhere(struct.pack(">I", 1000) + b"x")
        time.sleep(600)
    return [1.0] * len(completions)


def boasting(prompts: Prompts, completions: list[str]) -> list[float]:
    if "bad" in completions:
        write_everywhere(b"\xff" * 20)
        time.sleep(600)
    return [1.0] * len(completions)


def closing(prompts: Prompts, completions: list[str]) -> list[float]:
    if "bad" in completions:
        os.closerange(3, 64)
        time.sleep(600)
    return [1.0] * len(completions)


def daemonising(prompts: Prompts, completions: list[str]) -> list[float]:
    started(DAEMON, prompts)
    match completions[0]:
        case "late":
            time.sleep(600)
        case "exit":
            os._exit(3)
        case "kill the relay":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        case "stop the relay":
            os.kill(os.getppid(), signal.SIGSTOP)
            time.sleep(600)
    return [1.0] * len(completions)


def multiplying(prompts: Prompts, completions: list[str]) -> list[float]:
    started(HYDRA, prompts, least=5)
    return [1.0] * len(completions)
