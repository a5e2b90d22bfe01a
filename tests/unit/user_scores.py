"""Scoring functions as users may write them, good and bad; test_scoring.py runs them."""

import math
import os
import pathlib
import signal
import subprocess
import time

from raylign.records import Score

Prompts = list[list[dict[str, str]]]

VALUE = 3
PID = os.getpid()


def length(prompts: Prompts, completions: list[str]) -> object:
    print("to stdout")
    return [len(completion) for completion in completions]


def prompt_and_completion(prompts: Prompts, completions: list[str]) -> object:
    assert len(prompts) == len(completions)
    return [int(p[-1]["content"]) * 10 + int(c) for p, c in zip(prompts, completions, strict=True)]


def picky(prompts: Prompts, completions: list[str]) -> object:
    values = {"none": None, "nan": math.nan, "inf": -math.inf, "text": "abc", "bool": True}
    return [values[c] if c in values else float(c) for c in completions]


def raising(prompts: Prompts, completions: list[str]) -> object:
    if "bad" in completions:
        raise ValueError("cannot read\n 'bad' \x1b[31m")
    return [1.0] * len(completions)


def hanging(prompts: Prompts, completions: list[str]) -> object:
    if "bad" in completions:
        time.sleep(60)
    return [float(PID)] * len(completions)


def exiting(prompts: Prompts, completions: list[str]) -> object:
    if "bad" in completions:
        os._exit(3)
    if "worse" in completions:
        os.kill(os.getpid(), signal.SIGSEGV)
    return [1.0] * len(completions)


def miscounting(prompts: Prompts, completions: list[str]) -> object:
    return [1.0] * (len(completions) + ("bad" in completions))


def arrays(prompts: Prompts, completions: list[str]) -> object:
    import numpy  # noqa: PLC0415 - only here: every test would wait for it

    return numpy.arange(len(completions), dtype=numpy.float32)


def numpy_scalars(prompts: Prompts, completions: list[str]) -> object:
    import numpy  # noqa: PLC0415

    return [numpy.float32(0.5), numpy.int64(2)]


def detailed(prompts: Prompts, completions: list[str]) -> object:
    values = {"mute": None, "silent": None, "bad": math.nan}
    reasons = {"mute": "nothing\nto say", "bad": "no number", "told": "two\nlines"}
    return [Score(values.get(c, 1.0), {"length": len(c)}, reasons.get(c, "")) for c in completions]


def scalar(prompts: Prompts, completions: list[str]) -> object:
    return 0.5


def main_thread(prompts: Prompts, completions: list[str]) -> object:
    signal.alarm(0)
    return [float(len([n for n in os.environ if n == "MY_TOKEN"]))] * len(completions)


def spawning(prompts: Prompts, completions: list[str]) -> None:
    child = subprocess.Popen(["sleep", "60"])
    pathlib.Path(completions[0]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)
