"""The one HTTP client before servers that answer anything."""

import gzip
import zlib
from collections.abc import Callable

import pytest

from raylign.boundary.http import LARGEST_ANSWER, ask
from raylign.errors import ServerAway, ServerError, ServerLate
from tests.faults import record
from tests.hostile_servers import HEAD, NEVER_WHOLE, Pieces, endless, sending, whole

LONG_S = 300.0


def test_an_answer_is_status_headers_and_body() -> None:
    with sending(whole("é".encode(), "X-Y: z", status=404)) as url:
        answer = ask("GET", url, LONG_S)
    assert (answer.status, answer.headers["x-y"], answer.body, answer.text) == (404, "z", "é".encode(), "é")


@pytest.mark.parametrize("charset", ["base64", "utf-7", "idna", "no-such", "rot13", "utf-16", "\xff", "undefined"])
def test_text_is_utf_8_whatever_the_server_calls_it(charset: str) -> None:
    with sending(whole(b"\xffgood", f"Content-Type: text/plain; charset={charset}")) as url:
        assert ask("GET", url, LONG_S).text == "\ufffdgood"


@pytest.mark.fault
@pytest.mark.parametrize("pieces", NEVER_WHOLE.values(), ids=NEVER_WHOLE)
def test_an_answer_that_never_ends_is_late_although_bytes_come_all_the_time(pieces: Pieces) -> None:
    with sending(pieces) as url, pytest.raises(ServerLate, match="no whole answer in time"):
        ask("GET", url, 0.2)
    record("a server that drips its answer", "bytes every 20 ms, without end", detected_s=0.2, lost="nothing")


def test_a_body_that_the_server_does_not_take_is_late() -> None:
    with sending(endless(b"", b"", 0.02)) as url, pytest.raises(ServerLate):
        ask("PUT", url, 0.2, body=b"x" * 100)


@pytest.mark.fault
@pytest.mark.parametrize("head", [HEAD + b"Connection: close\r\n\r\n", HEAD + b"Content-Length: 999999999999\r\n\r\n"])
def test_an_answer_without_end_is_cut_at_the_limit(head: bytes) -> None:
    with sending(endless(head, b" " * 65536)) as url, pytest.raises(ServerError, match="answered with more than 4 MiB"):
        ask("GET", url, LONG_S)
    with sending(whole(b"x" * LARGEST_ANSWER)) as url:
        assert len(ask("GET", url, LONG_S).body) == LARGEST_ANSWER
    record("a server that never stops sending", "a body without end", lost="nothing: refused at 4 MiB")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("encoding", "packed"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("br, gzip", lambda _: b""), ("x" * 99, lambda _: b"")],
    ids=["gzip", "deflate", "two", "unknown"],
)
def test_nothing_is_unpacked(encoding: str, packed: Callable[[bytes], bytes]) -> None:
    with (
        sending(whole(packed(b"0" * 10**8), f"Content-Encoding: {encoding}")) as url,
        pytest.raises(ServerError, match=r"answered in the encoding '.{1,41}', which was not asked for"),
    ):
        ask("GET", url, LONG_S)
    record("a compressed bomb from a server", "100 MB in 100 kB, gzip and deflate", lost="nothing: never unpacked")


@pytest.mark.parametrize(
    "pieces",
    [
        whole(b"", "Content-Length: -1", length=False),
        whole(b"", "Content-Length: 1" + "0" * 5000, length=False),
        whole(b"zz\r\n", "Transfer-Encoding: chunked", length=False),
        whole(b"", "X: a\x00b"),
        endless(HEAD, b"X: " + b"y" * 60_000 + b"\r\n"),
        lambda: [b"\x16\x03\x01 no HTTP\r\n\r\n"],
        lambda: [],
        whole(b"cut", "Content-Length: 9", length=False),
    ],
    ids=["negative", "huge length", "no chunk", "NUL", "endless headers", "no HTTP", "nothing", "cut"],
)
def test_what_is_no_http_is_no_answer(pieces: Pieces) -> None:
    with sending(pieces) as url, pytest.raises(ServerAway):
        ask("GET", url, LONG_S)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://127.0.0.1:0/",
        "http://[::1",
        "http://127.0.0.1:99999/",
        "nothing",
        "http://\u2028/",
        "ftp://h/",
    ],
)
def test_what_is_no_address_is_away(url: str) -> None:
    with pytest.raises(ServerAway):
        ask("GET", url, LONG_S)


def test_a_redirect_is_an_answer_like_others() -> None:
    with sending(whole(b"", "Location: http://127.0.0.1:1/", status=302)) as url:
        assert ask("GET", url, LONG_S).status == 302
