"""Questions to a scoring server: retries, a limit on how many are under way, and no key in any text."""

import asyncio
import math
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Self, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from raylign.boundary.http import OK, Answer, connections
from raylign.boundary.secrets import REDACTED, without_secrets
from raylign.config.scoring import HttpScoringBlock, JudgeScoringBlock
from raylign.errors import RaylignError, ScorerError, ServerAway, ServerError, ServerLate
from raylign.report.text import one_line

FIRST_WAIT_S, LONGEST_WAIT_S, JITTER_S = 0.5, 8.0, 0.5
_SHOWN = 200
_PASSING = (408, 409, 429)
_OF_CONTENT = (400, 413, 422, 500)
RemoteBlock = JudgeScoringBlock | HttpScoringBlock
T = TypeVar("T")


class NoReply(RaylignError):
    """There is no usable answer; the text is the reason of an unscored item.

    `again`: whether another try may help, after `wait_s` seconds at least. `of_content`: whether what was asked may
    be to blame rather than the server.
    """

    def __init__(self, reason: str, *, again: bool = True, wait_s: float = 0.0, of_content: bool = False) -> None:
        super().__init__(reason)
        self.again, self.wait_s, self.of_content = again, wait_s, of_content


@dataclass(slots=True)
class Spending:
    """What asking took. `failures` are requests without a usable answer, retried or not."""

    requests: int = 0
    failures: int = 0

    def copy(self) -> Self:
        return type(self)(*(getattr(self, field.name) for field in fields(self)))

    def since(self, earlier: Self) -> Self:
        """What was added since `earlier` was copied."""
        return type(self)(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))


def api_key(block: RemoteBlock) -> str:
    """The key in this process's environment, "" without one. Raises ScorerError for what cannot stand in a header."""
    key = os.environ.get(block.api_key_env, "")
    if not all("!" <= char <= "~" for char in key):
        raise ScorerError(f"{block.api_key_env} holds whitespace or characters that no key has; set it without them")
    return key


def connected(block: RemoteBlock, key: str) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    """Connections that send `key`, at most `concurrency` of them."""
    return connections({"Authorization": f"Bearer {key}"} if key else None, limit=block.concurrency)


class Server:
    """One server as a scorer asks it, `concurrency` questions at a time.

    `address` is the option that says where it is; `at_404` what to check when there is nothing.
    """

    def __init__(self, block: RemoteBlock, key: str, spending: Spending, *, address: str, at_404: str) -> None:
        self._block, self._key, self._spending = block, key, spending
        self._address, self._at_404 = address, at_404
        self._turns = asyncio.Semaphore(block.concurrency)
        self._backoff = wait_exponential_jitter(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S, jitter=JITTER_S)
        self._stopped = ""

    def stop(self, reason: str) -> None:
        """Ask nothing any more: whatever still waits for its turn has no reply, for this `reason`."""
        self._stopped = reason

    async def ask(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt` gives, tried again where that may help. Raises NoReply."""
        trying = AsyncRetrying(
            stop=stop_after_attempt(self._block.retries + 1),
            wait=self._wait_s,
            retry=retry_if_exception(lambda error: isinstance(error, NoReply) and error.again),
            reraise=True,
        )
        async with self._turns:
            answer: T = await trying(self._try, attempt)
            return answer

    async def _try(self, attempt: Callable[[], Awaitable[T]]) -> T:
        if self._stopped:
            raise NoReply(self._stopped, again=False)
        try:
            return await attempt()
        except NoReply:
            self._spending.failures += 1
            raise

    def _wait_s(self, state: RetryCallState) -> float:
        failure = state.outcome.exception() if state.outcome else None
        asked_for = failure.wait_s if isinstance(failure, NoReply) else 0.0
        return asked_for + self._backoff(state)

    async def reply(self, post: Callable[[float], Awaitable[Answer]]) -> Answer:
        """An answer with status 200 within `timeout_s`. `post` gets the deadline. Raises NoReply."""
        try:
            answer = await post(asyncio.get_running_loop().time() + self._block.timeout_s)
        except ServerLate as error:
            raise NoReply(
                f"no answer within {self._block.timeout_s:g} s; see to the server, or raise scoring.timeout_s"
            ) from error
        except ServerAway as error:
            detail = self.shown(str(error))
            raise NoReply(f"cannot be reached ({detail}); start the server, or correct {self._address}") from error
        except ServerError as error:
            raise NoReply(f"{self.shown(str(error))}; see to the server", again=False) from error
        if answer.status != OK:
            raise self._failure(answer)
        return answer

    def shown(self, text: str, most: int = _SHOWN) -> str:
        """One line of `most` characters, without the key, in case the server repeats it, and without other secrets."""
        start = text[: 10 * most]
        kept = start.replace(self._key, REDACTED) if self._key else start
        return one_line(without_secrets(kept), most)

    def _failure(self, answer: Answer) -> NoReply:
        status, block = answer.status, self._block
        if status in (401, 403):
            sent = "the key is refused" if self._key else "no key was sent"
            return NoReply(
                f"HTTP {status}: {sent}; put the right one into {block.api_key_env} where the scorer runs", again=False
            )
        said, of_content = f"HTTP {status}: {self.shown(answer.text)}", status in _OF_CONTENT
        if status == 404:
            return NoReply(f"{said}; check {self._at_404}", again=False)
        if status not in _PASSING and status < 500:
            return NoReply(said, again=False, of_content=of_content)
        wait_s = retry_after_s(answer.headers.get("retry-after", ""))
        if wait_s > block.timeout_s:
            return NoReply(f"{said}; asks to wait {wait_s:g} s, scoring.timeout_s={block.timeout_s:g}", again=False)
        return NoReply(said, wait_s=wait_s, of_content=of_content)


def retry_after_s(header: str) -> float:
    """Seconds of a Retry-After header, which has a number or a date; 0 where it has neither."""
    text = header.strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        then = parsedate_to_datetime(text)
        return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError, TypeError, IndexError):  # years and offsets beyond any calendar, halves of dates
        return 0.0


def asking_s(requests: int, block: RemoteBlock) -> float:
    """Usage of this many requests that all failed until they were given up."""
    waits = block.timeout_s + LONGEST_WAIT_S + JITTER_S
    return math.ceil(requests / block.concurrency) * (block.timeout_s + block.retries * (block.timeout_s + waits))
