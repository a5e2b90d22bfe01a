"""Which processes of a test are there."""

import contextlib

import psutil


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has reaped does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def descendants(root: psutil.Process | None = None) -> dict[psutil.Process, str]:
    """`root` (this process), all that it started and what those started, each with its command line.

    One that has ended is left out, a zombie too: it has no command line any more.
    """
    root = root or psutil.Process()
    found = {}
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process] = " ".join(process.cmdline())
    return found


def engine_core(generator: psutil.Process) -> psutil.Process:
    """The process that computes for a generator on CPUs: the fork of the one that has imported vLLM ahead.

    vLLM names it by a title, which cannot be set where the first variable of the environment was.
    """
    (server,) = [child for child in generator.children() if "multiprocessing.forkserver" in " ".join(child.cmdline())]
    (core,) = server.children()
    return core
