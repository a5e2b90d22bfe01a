"""Which files of a package the pinned lists take hashes of, and what uv is told of pip's settings."""

from pathlib import Path
from typing import Any

import pytest
from packaging.utils import parse_wheel_filename

from deploy.lock import LockError, hashes, installs
from deploy.pip_to_uv import settings, variables


@pytest.mark.parametrize(
    ("tags", "taken"),
    [
        ("py3-none-any", True),
        ("py2.py3-none-any", True),
        ("py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64", True),
        ("py3-none-linux_x86_64", True),
        ("cp311-cp311-manylinux_2_28_x86_64", True),
        ("cp312-cp312-manylinux1_x86_64", True),
        ("cp313-cp313-manylinux_2_34_x86_64", True),
        ("cp310-abi3-manylinux_2_28_x86_64", True),
        ("cp39-abi3-manylinux2014_x86_64", True),
        ("py311-none-any", True),
        ("cp310-cp310-manylinux_2_28_x86_64", False),
        ("cp314-cp314-manylinux_2_28_x86_64", False),
        ("cp313-cp313t-manylinux_2_28_x86_64", False),
        ("cp314-abi3-manylinux_2_28_x86_64", False),
        ("py314-none-any", False),
        ("py2-none-any", False),
        ("pp311-pypy311_pp73-manylinux_2_28_x86_64", False),
        ("cp311-cp311-musllinux_1_2_x86_64", False),
        ("cp311-cp311-manylinux_2_28_aarch64", False),
        ("cp311-cp311-macosx_11_0_x86_64", False),
        ("cp311-cp311-win_amd64", False),
    ],
)
def test_wheels_of_the_three_pythons_on_linux_are_taken(tags: str, taken: bool) -> None:
    assert any(map(installs, parse_wheel_filename(f"name-1.0-{tags}.whl")[3])) is taken


def package(*wheels: str) -> dict[str, Any]:
    """A package of a pylock file with a source and these wheels; the hash of each is its tags."""
    found = [
        {"url": f"https://files.example/name-1.0%2Bcpu-{tags}.whl#egg", "hashes": {"sha256": tags}} for tags in wheels
    ]
    return {"name": "name", "version": "1.0+cpu", "sdist": {"hashes": {"sha256": "source"}}, "wheels": found}


def test_hashes_are_those_of_wheels_and_of_the_source_only_where_there_is_no_wheel() -> None:
    assert hashes(package("cp313-cp313-manylinux1_x86_64", "cp311-cp311-win_amd64", "cp311-cp311-linux_x86_64")) == [
        "cp311-cp311-linux_x86_64",
        "cp313-cp313-manylinux1_x86_64",
    ]
    assert hashes(package()) == ["source"]
    with pytest.raises(LockError, match="no wheel for Linux"):
        hashes(package("cp311-cp311-win_amd64"))


def test_uv_gets_what_pip_is_told(tmp_path: Path) -> None:
    listing = f"""\
:env:.disable-pip-version-check='1'
:env:.find-links='{tmp_path} /no/such/folder https://wheels.example/page.html'
:env:.timeout='90'
global.cert='/etc/ca.crt'
global.extra-index-url='https://one.example/simple\\nhttps://name:pass@two.example/simple'
global.find-links='/elsewhere'
global.index-url='https://global.example/simple'
global.no-index='false'
global.trusted-host='one.example two.example:8080'
install.index-url='https://install.example/simple'
freeze.timeout='1'
"""
    assert variables(settings(listing), {"UV_INSECURE_HOST": "mine.example"}) == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "https://install.example/simple",
        "UV_INDEX": "https://one.example/simple https://name:pass@two.example/simple",
        "UV_FIND_LINKS": f"{tmp_path},https://wheels.example/page.html",
        "UV_HTTP_TIMEOUT": "90",
        "SSL_CERT_FILE": "/etc/ca.crt",
    }


def test_switches_of_pip_are_handed_on() -> None:
    listing = ":env:.no-index='1'\nglobal.no-cache-dir='true'\nglobal.keyring-provider='import'\n"
    assert variables(settings(listing), {}) == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "no_index": "1",
        "UV_NO_CACHE": "1",
    }
