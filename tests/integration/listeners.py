"""Who listens on which TCP address, as the kernel says."""

import psutil


def descendants() -> list[psutil.Process]:
    """This process and all that it started, and what those started."""
    here = psutil.Process()
    return [here, *here.children(recursive=True)]


def listening() -> dict[tuple[str, int], str]:
    """(address, port) of every listening TCP socket of this process and its descendants, and the process's name."""
    found: dict[tuple[str, int], str] = {}
    for process in descendants():
        try:
            sockets, line = process.net_connections(kind="tcp"), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        found |= {tuple(each.laddr): line[:120] for each in sockets if each.status == psutil.CONN_LISTEN}
    return found
