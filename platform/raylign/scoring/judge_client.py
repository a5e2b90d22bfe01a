"""Requests to a judge behind an OpenAI-compatible endpoint: deadlines, retries, and answers that are a choice."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpx
from pydantic import BaseModel, Field, ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from raylign.config.scoring import JudgeScoringBlock
from raylign.errors import ScorerError
from raylign.scoring.judge_prompt import Question
from raylign.text import escape_control
from raylign.tracking.params import REDACTED

MAX_TOKENS = 8
"""Room for the longest choice in any tokenizer."""
FIRST_WAIT_S, LONGEST_WAIT_S, JITTER_S = 0.5, 8.0, 0.5
_SHOWN = 200
_PASSING = (408, 409, 429)


class NoVerdict(Exception):
    """A judge gave no verdict; the text is the reason of an unscored item.

    `again`: whether another try may help, after `wait_s` seconds at least.
    """

    def __init__(self, reason: str, *, again: bool = True, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.again, self.wait_s = again, wait_s


class UnclearAnswer(NoVerdict):
    """The judge answered, but none of the choices."""


@dataclass(slots=True)
class Ledger:
    """What judging took. `failures` are requests without a verdict, retried or not.

    `tokens` is the usage that the server states (prompt and answer); `unmetered` answers state none. A comparison is
    two verdicts; it counts as a disagreement where they differ.
    """

    requests: int = 0
    failures: int = 0
    comparisons: int = 0
    disagreements: int = 0
    tokens: int = 0
    unmetered: int = 0

    def copy(self) -> Self:
        return type(self)(*(getattr(self, field.name) for field in fields(self)))

    def since(self, earlier: "Ledger") -> Self:
        """What was added since `earlier` was copied."""
        return type(self)(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: Any = None


def api_key(block: JudgeScoringBlock) -> str:
    """The key in this process's environment, "" without one. Raises ScorerError for what cannot stand in a header."""
    key = os.environ.get(block.api_key_env, "")
    if not all("!" <= char <= "~" for char in key):
        raise ScorerError(f"{block.api_key_env} holds whitespace or characters that no key has; set it without them")
    return key


@asynccontextmanager
async def connected(block: JudgeScoringBlock, key: str, ledger: Ledger) -> AsyncIterator["JudgeClient"]:
    """A client with connections of its own; it writes what it spends to `ledger`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=block.concurrency)
    # No timeouts of httpx: they are per read, ours is for a whole request.
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=None) as http:
        yield JudgeClient(block, key, http, ledger)


class JudgeClient:
    """Asks one judge, `concurrency` questions at a time. Where the server takes it, only choices can be answered."""

    def __init__(self, block: JudgeScoringBlock, key: str, http: httpx.AsyncClient, ledger: Ledger) -> None:
        self.ledger = ledger
        self._block, self._key, self._http = block, key, http
        self._url = f"{block.base_url.rstrip('/')}/chat/completions"
        self._turns = asyncio.Semaphore(block.concurrency)
        self._backoff = wait_exponential_jitter(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S, jitter=JITTER_S)
        self._takes_choices, self._stopped = True, ""

    def stop(self, reason: str) -> None:
        """Ask nothing any more: every question that still waits for its turn has no verdict, for this `reason`."""
        self._stopped = reason

    async def ask(self, make: Callable[[], Question]) -> str:
        """The choice that the judge takes; every try asks a new question of `make`. Raises NoVerdict."""
        trying = AsyncRetrying(
            stop=stop_after_attempt(self._block.retries + 1),
            wait=self._wait_s,
            retry=retry_if_exception(lambda error: isinstance(error, NoVerdict) and error.again),
            reraise=True,
        )
        async with self._turns:
            answer: str = await trying(self._try, make)
            return answer

    async def _try(self, make: Callable[[], Question]) -> str:
        if self._stopped:
            raise NoVerdict(self._stopped, again=False)
        question = make()
        try:
            return self._choice(await self._answer(question), question)
        except NoVerdict:
            self.ledger.failures += 1
            raise

    def _wait_s(self, state: RetryCallState) -> float:
        failure = state.outcome.exception() if state.outcome else None
        asked_for = failure.wait_s if isinstance(failure, NoVerdict) else 0.0
        return asked_for + self._backoff(state)

    async def _answer(self, question: Question) -> httpx.Response:
        """A response with status 200."""
        try:
            async with asyncio.timeout(self._block.timeout_s):
                response = await self._post_as_the_server_takes_it(question)
        except TimeoutError as error:
            raise NoVerdict(
                f"no answer within {self._block.timeout_s:g} s; see to the server, or raise scoring.timeout_s"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            detail = self._shown(f"{type(error).__name__}: {error}")
            raise NoVerdict(f"cannot be reached ({detail}); start the server, or correct scoring.base_url") from error
        if response.status_code != httpx.codes.OK:
            raise self._failure(response)
        return response

    async def _post_as_the_server_takes_it(self, question: Question) -> httpx.Response:
        response = await self._post(question, constrained=self._takes_choices)
        if response.status_code in (400, 422) and self._takes_choices:
            # The constraint is vLLM's own; but the question may be what is refused, say for its length.
            response = await self._post(question, constrained=False)
            self._takes_choices = not response.is_success
        return response

    async def _post(self, question: Question, *, constrained: bool) -> httpx.Response:
        body: dict[str, Any] = {
            "model": self._block.model,
            "messages": [
                {"role": "system", "content": question.system},
                {"role": "user", "content": question.user},
            ],
            "temperature": self._block.temperature,
            "max_tokens": MAX_TOKENS,
        }
        if constrained:
            body["structured_outputs"] = {"choice": list(question.choices)}
        self.ledger.requests += 1
        return await self._http.post(self._url, json=body)

    def _choice(self, response: httpx.Response, question: Question) -> str:
        try:
            completion = _Completion.model_validate_json(response.content)
        except ValidationError as error:
            raise NoVerdict(f"answered with no chat completion: {self._shown(response.text)}") from error
        match completion.usage:
            case {"total_tokens": int(tokens)} if tokens >= 0:
                self.ledger.tokens += tokens
            case _:
                self.ledger.unmetered += 1
        content = completion.choices[0].message.content or ""
        if content.strip() not in question.choices:
            raise UnclearAnswer(f"answered {self._shown(repr(content))}, none of {', '.join(question.choices)}")
        return content.strip()

    def _failure(self, response: httpx.Response) -> NoVerdict:
        status, block = response.status_code, self._block
        if status in (401, 403):
            sent = "the key is refused" if self._key else "no key was sent"
            return NoVerdict(
                f"HTTP {status}: {sent}; put the right one into {block.api_key_env} where the scorer runs", again=False
            )
        said = f"HTTP {status}: {self._shown(response.text)}"
        if status == 404:
            where = "that scoring.base_url ends as the server wants it (most: /v1)"
            return NoVerdict(f"{said}; check scoring.model={block.model}, and {where}", again=False)
        if status not in _PASSING and status < 500:
            return NoVerdict(said, again=False)
        wait_s = _retry_after_s(response.headers.get("Retry-After", ""))
        if wait_s > block.timeout_s:
            return NoVerdict(f"{said}; asks to wait {wait_s:g} s, scoring.timeout_s={block.timeout_s:g}", again=False)
        return NoVerdict(said, wait_s=wait_s)

    def _shown(self, text: str) -> str:
        """One short line, without the key in case the server repeats it."""
        kept = text.replace(self._key, REDACTED) if self._key else text
        line = escape_control(" ".join(kept.split()))
        return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


def _retry_after_s(header: str) -> float:
    """Seconds of a Retry-After header, which has a number or a date; 0 where it has neither."""
    if header.strip().isdecimal():
        return float(header)
    try:
        then = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
