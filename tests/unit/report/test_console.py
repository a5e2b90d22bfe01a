"""Whose words reach the console: raylign's, and nobody else's. Each case is a process of its own, as a run is."""

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console

from raylign.report.console import keep_library_log, stage_progress

ROOT = Path(__file__).resolve().parents[3]
LIBRARY = """
import logging, sys, warnings
from tqdm import tqdm

log = logging.getLogger("somelib")
log.propagate = False
log.addHandler(logging.StreamHandler())
out = logging.getLogger("otherlib")
out.propagate = False
out.addHandler(logging.StreamHandler(sys.stdout))


def talk(number):
    log.warning("handler %d", number)
    out.warning("outhandler %d", number)
    logging.getLogger("plainlib.part").warning("root %d", number)
    warnings.warn(f"warned {number}")
    print(f"printed {number}")
    print(f"complained {number}", file=sys.stderr)
    list(tqdm(range(3), desc=f"bar {number}"))
"""
RUN = """
import logging, pathlib, sys
from raylign.report.console import keep_library_log, libraries_aside, log_to_console
from raylign.report.tables import report_console

log_to_console()
with libraries_aside():
    import library

    library.talk(1)
    logging.getLogger("raylign.run.rounds").info("own info")
    logging.getLogger("actors.supervision.incidents").warning("lost \\x1b[2J at http://me:secret@host")
    logging.getLogger("actors.supervision.incidents").info("not shown")
    report_console().print("a table")
    kept = keep_library_log(pathlib.Path(sys.argv[1]))
    report_console().print(f"kept {kept.name}")
    library.talk(2)
library.log.warning("handler 3")
print("after")
"""
WORDS = ("handler", "outhandler", "root", "warned", "printed", "complained", "bar")


def started(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    (folder / "library.py").write_text(LIBRARY)
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "platform")])
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_libraries_speak_to_a_file_and_raylign_to_the_console(tmp_path: Path) -> None:
    done = started(tmp_path, RUN)
    assert done.stdout.splitlines() == ["a table", "kept libraries.log", "after"]
    assert done.stderr.splitlines() == [
        "INFO raylign.run.rounds: own info",
        r"WARNING actors.supervision.incidents: lost \x1b[2J at http://host",
    ]
    kept = (tmp_path / "libraries.log").read_text()
    assert [f"{word} {number}" for word in WORDS for number in (1, 2) if f"{word} {number}" not in kept] == []
    assert "own info" in kept and "handler 3" in kept, "a handler that was made inside goes on there"


def test_what_ends_a_command_reaches_the_console(tmp_path: Path) -> None:
    code = "from raylign.report.console import libraries_aside\nwith libraries_aside():\n    raise OSError('no way on')"
    done = started(tmp_path, code)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "OSError: no way on"


def test_a_run_that_is_continued_keeps_the_log_of_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        assert started(tmp_path, RUN).returncode == 0
    assert (tmp_path / "libraries.log").read_text().count("printed 1\n") == 2


def test_a_full_disk_costs_a_library_only_its_words(tmp_path: Path) -> None:
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))\n"
    done = started(
        tmp_path,
        "from raylign.report.console import libraries_aside\nwith libraries_aside():\n"
        f"    import library\n    exec({full!r})\n    library.talk(1)\n    library.talk(2)\nprint('after')",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "after\n", "")


def test_nothing_is_kept_where_nothing_is_set_aside(tmp_path: Path) -> None:
    assert keep_library_log(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_progress_bar_shows_no_output_of_others() -> None:
    screen = StringIO()
    with stage_progress(Console(file=screen, force_terminal=True), "sample", 2) as advance:
        print("Writing model shards")
        print("Setting accelerator to CPU", file=sys.stderr)
        advance(2)
    assert "sample" in screen.getvalue()
    assert "Writing" not in screen.getvalue() and "Setting" not in screen.getvalue()
