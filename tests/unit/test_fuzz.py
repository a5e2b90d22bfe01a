"""Inputs that nobody meant, in every format that is read: the same each time, and those that once broke a reader."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import record

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = 30
CPU_S = 300


@pytest.mark.fault
def test_every_format_takes_or_refuses_whatever_it_gets() -> None:
    tried = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--examples", str(EXAMPLES)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S)),
        capture_output=True,
        text=True,
        check=False,
    )
    table = re.findall(r"^(\S+) +([\d,]+) +([\d,]+) +([\d,]+)$", tried.stdout, re.MULTILINE)
    assert tried.returncode == 0 and table, tried.stdout[-4000:] + tried.stderr[-4000:]
    assert all(int(inputs.replace(",", "")) for _, inputs, _, _ in table), table
    record(
        "files, names and answers that nobody meant",
        f"{len(table)} formats, cut, doubled, retyped and mixed up, with limits of CPU time and memory",
        lost="nothing: taken or refused with a cure",
    )


def test_a_reader_that_breaks_its_promise_is_found() -> None:
    script = (
        "from raylign.errors import RaylignError\n"
        "from tests.fuzz import guard\n"
        "def endless(data):\n"
        "    while True: pass\n"
        "def large(data): return bytearray(2 << 30)\n"
        "def untold(data): raise KeyError('a')\n"
        "def bare(data): raise RaylignError('it is wrong')\n"
        "def good(data): raise RaylignError('it is wrong; correct it')\n"
        "guard.CPU_S = 1\n"
        "with guard.limited_memory():\n"
        "    for reader in (endless, large, untold, bare):\n"
        "        try: guard.read(reader, b'')\n"
        "        except guard.Defect as defect: print(defect)\n"
        "    print(guard.read(good, b''), guard.read(len, b''))\n"
    )
    told = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == [
        "more than 1 CPU seconds",
        "more than 1024 MiB",
        "KeyError: 'a'",
        "RaylignError without a cure: 'it is wrong'",
        "False True",
    ]
