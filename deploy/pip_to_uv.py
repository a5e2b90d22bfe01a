"""What pip is configured with, as environment variables for uv, which does not read pip's configuration.

Reads `pip config list` on standard input (global, user and environment settings, one `section.name='value'` a line) and
writes one `NAME=VALUE` a line. Variables and not options: an index address may hold a password, and other users of a
machine can read command lines. A variable of uv's own that is set already wins. Standard library only: it runs before
any package is installed.
"""

import ast
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

# pip's own order: what is set for `pip install` goes before what is set for all of pip, the environment before both.
SECTIONS = ("global", "install", ":env:")
# pip takes the best match of all indexes. uv would stop at the first index that knows a name, at any version.
ALWAYS = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
# pip's setting -> uv's variable, and what stands between the values of one that takes several.
LISTS = {
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
}
SINGLE = {
    "index-url": "UV_DEFAULT_INDEX",
    "keyring-provider": "UV_KEYRING_PROVIDER",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
}
# uv has no variable for --no-index: deploy/setup.sh reads this one of its own.
SWITCHES = {"no-index": "no_index", "no-cache-dir": "UV_NO_CACHE"}
YES = ("1", "true", "yes", "on")
# Values of pip that mean nothing to uv.
KEYRING = ("disabled", "subprocess")


def settings(listing: str) -> dict[str, str]:
    """pip's name -> value, of the sections that `pip install` reads, the strongest last word on each."""
    found: dict[str, str] = {}
    for section in SECTIONS:
        for line in listing.splitlines():
            key, equals, value = line.partition("=")
            if equals and key.startswith(f"{section}."):
                found[key.removeprefix(f"{section}.")] = str(ast.literal_eval(value))
    return found


def find_links(value: str) -> list[str]:
    """The places of pip's find-links with `~` resolved, less folders that do not exist: pip warns of one, uv stops."""
    links = [os.path.expanduser(link) for link in value.split()]
    return [
        link
        for link, address in ((link, urlsplit(link)) for link in links)
        if address.scheme not in ("", "file") or Path(unquote(address.path)).exists()
    ]


def variables(pip: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """uv's variables for these settings of pip, less those that the environment has."""
    found = dict(ALWAYS)
    for name, (variable, separator) in LISTS.items():
        values = find_links(pip.get(name, "")) if name == "find-links" else pip.get(name, "").split()
        if values:
            found[variable] = separator.join(values)
    for name, variable in SINGLE.items():
        if pip.get(name, "") and not (name == "keyring-provider" and pip[name] not in KEYRING):
            found[variable] = pip[name]
    for name, variable in SWITCHES.items():
        if pip.get(name, "").lower() in YES:
            found[variable] = "1"
    return {variable: value for variable, value in found.items() if variable not in environment}


if __name__ == "__main__":
    for variable, value in variables(settings(sys.stdin.read()), os.environ).items():
        print(f"{variable}={value}")
