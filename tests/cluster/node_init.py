"""The first process of a node: it gives the node its own folders and name, and when it ends all of the node ends.

`python -I node_init.py SPEC`, where SPEC is JSON of `name`, `hosts` (the text of /etc/hosts), `folder` (becomes /tmp),
`kept` (paths that stay what they are) and `shm_bytes`. It says "ready" and goes on until its stdin is closed, which the
death of its maker does too. It runs in namespaces of its own, so that none of this is seen outside.
"""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

TMP = Path("/tmp")


def own_folders(folder: Path, hosts: str, kept: list[Path], shm_bytes: int) -> None:
    """An empty /dev/shm of that size; `folder` as /tmp, and what of /tmp is `kept` at its old place in it."""
    _mount("-t", "tmpfs", "-o", f"size={shm_bytes}", "tmpfs", "/dev/shm")
    (folder / "etc-hosts").write_text(hosts)
    _mount("--bind", str(folder / "etc-hosts"), "/etc/hosts")
    tmp = folder / "tmp"
    for path in (TMP / "home", *kept):
        if path.is_relative_to(TMP):
            (tmp / path.relative_to(TMP)).mkdir(parents=True, exist_ok=True)
    for path in kept:
        if path.is_relative_to(TMP):
            _mount("--bind", str(path), str(tmp / path.relative_to(TMP)))
    _mount("--rbind", str(tmp), str(TMP))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def main() -> None:
    spec = json.loads(sys.argv[1])
    socket.sethostname(spec["name"])
    own_folders(Path(spec["folder"]), spec["hosts"], [Path(path) for path in spec["kept"]], spec["shm_bytes"])
    # Nobody else waits for the children of processes that have ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
