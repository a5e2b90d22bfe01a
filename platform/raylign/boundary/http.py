"""HTTP to servers that may answer anything: one deadline for a whole request, a limit on the answer, no codecs.

Everything in raylign that speaks HTTP does it here, MLflow's client included (`raylign.tracking.transport`).
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from http.cookiejar import CookieJar
from typing import Any

import httpx

from raylign.errors import ServerAway, ServerError, ServerLate

LARGEST_ANSWER = 4 << 20
"""Bytes. Parsed JSON takes up to a hundred times as much memory."""
OK = 200
_BAD_PORT = (OverflowError, ExceptionGroup)
"""What anyio makes of a port beyond 65535."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP answer. Made by `exchange`; names in `headers` are in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as UTF-8, whatever charset the server names."""
        return self.body.decode("utf-8", "replace")


@asynccontextmanager
async def connections(
    headers: Mapping[str, str] | None = None,
    *,
    limit: int = 1,
    tls: ssl.SSLContext | None = None,
    proxy: str | None = None,
    trust_env: bool = True,
) -> AsyncIterator[httpx.AsyncClient]:
    """Connections, at most `limit` of them, for requests that all send `headers`.

    Without `trust_env` no proxy is taken from the environment.
    """
    # No timeouts of httpx: they are per read, ours is for a whole request.
    async with httpx.AsyncClient(
        headers=headers,
        cookies=_NoCookies(),
        limits=httpx.Limits(max_connections=limit),
        timeout=None,
        verify=tls or _usual_tls(),
        proxy=proxy,
        trust_env=trust_env,
    ) as http:
        yield http


async def exchange(
    http: httpx.AsyncClient,
    method: str,
    url: str,
    deadline: float,
    *,
    body: bytes | AsyncIterator[bytes] = b"",
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """The answer to one request, whole by `deadline` (on the event loop's clock). No redirect is followed.

    Raises ServerAway where there is no connection or no HTTP, ServerLate past the deadline, ServerError for an answer
    that is too large or encoded.
    """
    plain = httpx.Headers(headers)
    plain["Accept-Encoding"] = "identity"
    try:
        async with (
            asyncio.timeout_at(deadline),
            http.stream(method, url, content=body, headers=plain, follow_redirects=False) as response,
        ):
            return Answer(response.status_code, dict(response.headers), await _whole(response))
    except TimeoutError as error:
        raise ServerLate("no whole answer in time") from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError, *_BAD_PORT) as error:
        raise ServerAway(f"{type(error).__name__}: {error}") from error


def ask(
    method: str,
    url: str,
    timeout_s: float,
    *,
    body: bytes | AsyncIterator[bytes] = b"",
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
    proxy: str | None = None,
    trust_env: bool = True,
) -> Answer:
    """`exchange` over a connection of its own, whole within `timeout_s`, for callers without an event loop."""

    async def once() -> Answer:
        deadline = asyncio.get_running_loop().time() + timeout_s
        async with connections(tls=tls, proxy=proxy, trust_env=trust_env) as http:
            return await exchange(http, method, url, deadline, body=body, headers=headers)

    return asyncio.run(once())


async def _whole(response: httpx.Response) -> bytes:
    encoding = response.headers.get("Content-Encoding", "").strip()
    if encoding.lower() not in ("", "identity"):
        raise ServerError(f"answered in the encoding {encoding[:40]!r}, which was not asked for")
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > LARGEST_ANSWER:
            raise ServerError(f"answered with more than {LARGEST_ANSWER >> 20} MiB")
    return bytes(body)


class _NoCookies(CookieJar):
    """Servers keep nothing here."""

    def extract_cookies(self, response: Any, request: Any) -> None:
        """Not even read."""


@cache
def _usual_tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()
