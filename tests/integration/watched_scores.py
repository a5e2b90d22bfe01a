"""A scoring function that can be watched and stopped from outside; test_scorer_faults.py runs it.

The prompt of every item is a folder. Each call notes the scorer actor's process and what it was asked in `asked.jsonl`,
then obeys the completions: "wait" waits until the file `go` is there, "none" abstains, "fatal" ends the scorer actor.
"""

import json
import os
import signal
import time
from pathlib import Path

import psutil


def length(prompts: list[list[dict[str, str]]], completions: list[str]) -> list[float | None]:
    folder, actor = Path(prompts[0][-1]["content"]), psutil.Process(os.getppid()).ppid()
    with (folder / "asked.jsonl").open("a") as file:
        file.write(json.dumps({"actor": actor, "completions": completions}) + "\n")
    while "wait" in completions and not (folder / "go").exists():
        time.sleep(0.02)
    if "fatal" in completions:
        os.kill(actor, signal.SIGKILL)
    return [None if completion == "none" else float(len(completion)) for completion in completions]
