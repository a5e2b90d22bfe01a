"""Requests to a judge behind an OpenAI-compatible endpoint, and answers that are a choice."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import BaseModel, Field, ValidationError

from raylign.boundary.http import Answer, exchange
from raylign.config.scoring import JudgeScoringBlock
from raylign.scoring import http_client
from raylign.scoring.http_client import NoReply, Server, Spending
from raylign.scoring.judge_prompt import Question

MAX_TOKENS = 8
"""Room for the longest choice in any tokenizer."""
_MOST_TOKENS = 1_000_000_000


class UnclearAnswer(NoReply):
    """The judge answered, but none of the choices."""


@dataclass(slots=True)
class JudgeSpending(Spending):
    """What judging took. `failures` are requests without a verdict, retried or not.

    `tokens` is the usage that the server states (`tokens_in` asked, `tokens_out` answered, where it tells them apart);
    `unmetered` answers state none. A comparison is two verdicts; it counts as a disagreement where they differ.
    """

    comparisons: int = 0
    disagreements: int = 0
    tokens: int = 0
    unmetered: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: Any = None


@asynccontextmanager
async def connected(block: JudgeScoringBlock, key: str, spending: JudgeSpending) -> AsyncIterator["JudgeClient"]:
    """A client with connections of its own; it writes what it spends to `spending`."""
    async with http_client.connected(block, key) as http:
        yield JudgeClient(block, key, http, spending)


class JudgeClient:
    """Asks one judge, `concurrency` questions at a time. Where the server takes it, only choices can be answered."""

    def __init__(self, block: JudgeScoringBlock, key: str, http: httpx.AsyncClient, spending: JudgeSpending) -> None:
        self.spending = spending
        self._block, self._http = block, http
        self._url = f"{block.base_url.rstrip('/')}/chat/completions"
        where = "that scoring.base_url ends as the server wants it (most: /v1)"
        self._server = Server(
            block, key, spending, address="scoring.base_url", at_404=f"scoring.model={block.model}, and {where}"
        )
        self._takes_choices = True

    def stop(self, reason: str) -> None:
        """Ask nothing any more: every question that still waits for its turn has no verdict, for this `reason`."""
        self._server.stop(reason)

    async def ask(self, make: Callable[[], Question]) -> str:
        """The choice that the judge takes; every try asks a new question of `make`. Raises NoReply."""

        async def attempt() -> str:
            question = make()
            answer = await self._server.reply(lambda deadline: self._post_as_the_server_takes_it(question, deadline))
            return self._choice(answer, question)

        return await self._server.ask(attempt)

    async def _post_as_the_server_takes_it(self, question: Question, deadline: float) -> Answer:
        answer = await self._post(question, deadline, constrained=self._takes_choices)
        if answer.status in (400, 422) and self._takes_choices:
            # The constraint is vLLM's own; but the question may be what is refused, say for its length.
            answer = await self._post(question, deadline, constrained=False)
            self._takes_choices = not 200 <= answer.status < 300
        return answer

    async def _post(self, question: Question, deadline: float, *, constrained: bool) -> Answer:
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
        self.spending.requests += 1
        # Half a surrogate pair has no UTF-8 form; JSON can escape it.
        content, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        return await exchange(self._http, "POST", self._url, deadline, body=content, headers=kind)

    def _choice(self, answer: Answer, question: Question) -> str:
        try:
            completion = _Completion.model_validate_json(answer.body)
        except ValidationError as error:
            raise NoReply(f"answered with no chat completion: {self._server.shown(answer.text)}") from error
        self._meter(completion.usage)
        content = completion.choices[0].message.content or ""
        if content.strip() not in question.choices:
            raise UnclearAnswer(f"answered {self._server.shown(repr(content))}, none of {', '.join(question.choices)}")
        return content.strip()

    def _meter(self, usage: Any) -> None:
        match usage:
            case {"total_tokens": tokens} if _is_count(tokens):
                self.spending.tokens += tokens
            case _:
                self.spending.unmetered += 1
        match usage:
            case {"prompt_tokens": asked, "completion_tokens": answered} if _is_count(asked) and _is_count(answered):
                self.spending.tokens_in += asked
                self.spending.tokens_out += answered


def _is_count(value: object) -> bool:
    """Whether a server's number of tokens can be one."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS
