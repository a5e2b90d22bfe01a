"""MLflow's own requests, sent by raylign's HTTP client.

MLflow's limit to a request is per read: a server that sends a byte now and then, or never stops sending, would hold or
fill the process. `limited` puts our adapter into the `requests` session that MLflow makes; a test holds that every
request of MLflow's client comes this way.
"""

import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from http.client import responses
from io import BytesIO
from pathlib import Path
from typing import Any

import requests
from mlflow.utils import request_utils
from requests.adapters import BaseAdapter
from requests.structures import CaseInsensitiveDict
from requests.utils import DEFAULT_CA_BUNDLE_PATH, select_proxy

from raylign.boundary.http import Answer, ask
from raylign.errors import ServerError, ServerLate

SLOWEST_UPLOAD = 64 << 10
"""Bytes a second: what a body adds to the deadline of its request."""
_PIECE = 1 << 16
_USUAL_S = 20.0


class LimitedAdapter(BaseAdapter):
    """Sends what `requests` has prepared. The timeout is for the whole request and answer, sending the body aside."""

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: float | tuple[float | None, float | None] | None = None,
        verify: bool | str = True,
        cert: str | bytes | tuple[str, str] | None = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """Raises the errors of `requests`."""
        url = str(request.url)
        headers = {name: _text(value) for name, value in (request.headers or {}).items()}
        size = int(headers.get("Content-Length", 0))
        try:
            answer = ask(
                str(request.method),
                url,
                _seconds(timeout) + size / SLOWEST_UPLOAD,
                body=_body(request.body),
                headers=headers,
                tls=_tls(verify, cert) if url.lower().startswith("https:") else None,
                proxy=select_proxy(url, dict(proxies or {})),
                trust_env=False,  # `requests` has looked there
            )
        except ServerLate as error:
            raise requests.Timeout(str(error), request=request) from error
        except ServerError as error:
            raise requests.ConnectionError(str(error), request=request) from error
        return _response(answer, request)

    def close(self) -> None:
        """Nothing is kept open between requests."""


@contextmanager
def limited() -> Iterator[None]:
    """Requests of MLflow's that this thread makes inside are sent by `LimitedAdapter`."""
    token = _limited.set(True)
    try:
        yield
    finally:
        _limited.reset(token)


def _session(*arguments: Any, **options: Any) -> requests.Session:
    return _our_session() if _limited.get() else _session_of_mlflow(*arguments, **options)


@cache
def _our_session() -> requests.Session:
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, LimitedAdapter())
    return session


_limited: ContextVar[bool] = ContextVar("limited", default=False)
_session_of_mlflow: Callable[..., requests.Session] = request_utils._get_request_session
request_utils._get_request_session = _session


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def _seconds(timeout: float | tuple[float | None, float | None] | None) -> float:
    given = timeout if isinstance(timeout, tuple) else (timeout,)
    return sum(part for part in given if part is not None) or _USUAL_S


def _body(body: Any) -> bytes | AsyncIterator[bytes]:
    match body:
        case None:
            return b""
        case str():
            return body.encode()
        case bytes():
            return body
        case _:
            return _pieces(body)


async def _pieces(body: Any) -> AsyncIterator[bytes]:
    """Of an open file, or of whatever gives bytes in turn."""
    for piece in iter(lambda: body.read(_PIECE), b"") if hasattr(body, "read") else body:
        yield piece


@cache
def _tls(verify: bool | str, cert: str | bytes | tuple[str, str] | None) -> ssl.SSLContext:
    trusted = DEFAULT_CA_BUNDLE_PATH if verify in (True, "") else str(verify)
    folder = Path(trusted).is_dir()
    known = None if verify is False else trusted
    context = ssl.create_default_context(cafile=None if folder else known, capath=known if folder else None)
    if verify is False:  # MLFLOW_TRACKING_INSECURE_TLS
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cert:
        context.load_cert_chain(*((cert,) if isinstance(cert, str | bytes) else cert))
    return context


def _response(answer: Answer, request: requests.PreparedRequest) -> requests.Response:
    response = requests.Response()
    response.status_code, response.url, response.request = answer.status, str(request.url), request
    response.headers = CaseInsensitiveDict(answer.headers)
    response.raw, response.encoding = BytesIO(answer.body), "utf-8"
    response.reason = responses.get(answer.status, "")
    return response
