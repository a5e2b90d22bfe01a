"""Scores from a reward service over HTTP."""

import asyncio
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import httpx
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ValidationError

from raylign.boundary.http import Answer, exchange
from raylign.boundary.templates import require_bounded
from raylign.chunks import chunks
from raylign.config.scoring import HttpScoringBlock
from raylign.errors import ModelError, ScorerError
from raylign.reading.files import read_text
from raylign.records import Prompt, Score
from raylign.run.fingerprints import fingerprint
from raylign.run.inputs import Input
from raylign.scoring.base import ItemScorer, ScoringItem, most_unscored, skipped
from raylign.scoring.http_client import NoReply, Server, Spending, api_key, asking_s, connected
from raylign.scoring.kind import Kind, Near, file_hash

PROBE = ScoringItem(Prompt("probe", ({"role": "user", "content": "Say hello."},), ()), "Hello.")
_Answer = tuple[Score, bool]
"""A score, and whether it is a fault that another request may not have."""


class BadAnswer(NoReply):
    """The service answered, but not with scores."""


class _Scores(BaseModel):
    scores: list[Any]
    reasons: list[str | None] | None = None


class _Rewards(BaseModel):
    rewards: list[Any]


class HttpScorer:
    """Posts batches of items to a service; see the config block for what is sent and read.

    A batch that the service refuses or answers with the wrong number of scores is asked item by item, and so is an
    item whose score is no finite number: only those that fail on their own stay unscored. Where the service is away
    or late there is nothing to blame on an item, and the batch is unscored after its retries.
    """

    def __init__(self, block: HttpScoringBlock) -> None:
        """Asks nothing yet. Raises ScorerError when the key cannot be sent or the template cannot be read."""
        self.spent = Spending()
        self._block, self._key = block, api_key(block)
        self._template = template_of(block)

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order. Stops asking once more than `allowed` of `items` are unscored."""
        limit = most_unscored(len(items), self._block.max_unscored) if allowed is None else allowed
        return asyncio.run(self._score(items, limit))

    def amounts(self) -> dict[str, float]:
        """What was spent so far, by the names of metrics."""
        return {"requests": self.spent.requests, "failed_requests": self.spent.failures}

    async def _score(self, items: Sequence[ScoringItem], allowed: int) -> list[Score]:
        async with connected(self._block, self._key) as http:
            asking = _Asking(self._block, self._key, http, self.spent, self._template, allowed)
            found = await asyncio.gather(*map(asking.batch, chunks(items, self._block.batch_size)))
        return [score for scores in found for score in scores]


class _Asking:
    """One call's requests, of whose items `allowed` may stay unscored before nothing is asked any more."""

    def __init__(
        self,
        block: HttpScoringBlock,
        key: str,
        http: httpx.AsyncClient,
        spending: Spending,
        template: Template | None,
        allowed: int,
    ) -> None:
        self._block, self._http, self._spending, self._template = block, http, spending, template
        at_404 = f"that scoring.url={block.url} is right"
        self._server = Server(block, key, spending, address="scoring.url", at_404=at_404)
        self._allowed, self._unscored = allowed, 0

    async def batch(self, items: Sequence[ScoringItem]) -> list[Score]:
        try:
            answers = await self.ask(items)
        except NoReply as failure:
            answers = [(Score(None, reason=str(failure)), failure.of_content)] * len(items)
        if len(items) == 1:
            return [self._count(answers[0][0])]
        again = [item for item, (_, faulty) in zip(items, answers, strict=True) if faulty]
        alone = iter(await asyncio.gather(*(self.batch([item]) for item in again)))
        return [next(alone)[0] if faulty else self._count(score) for score, faulty in answers]

    def _count(self, score: Score) -> Score:
        self._unscored += score.value is None
        if self._unscored > self._allowed:
            self._server.stop(skipped(self._block.max_unscored).reason)
        return score

    async def ask(self, items: Sequence[ScoringItem]) -> list[_Answer]:
        """Answers of one request. Raises NoReply."""
        # Half a surrogate pair has no UTF-8 form; JSON can escape it.
        body = json.dumps(self._request(items)).encode()

        async def post(deadline: float) -> Answer:
            self._spending.requests += 1
            kind = {"Content-Type": "application/json"}
            return await exchange(self._http, "POST", self._block.url, deadline, body=body, headers=kind)

        async def attempt() -> list[_Answer]:
            return self._scores(await self._server.reply(post), len(items))

        return await self._server.ask(attempt)

    def _request(self, items: Sequence[ScoringItem]) -> dict[str, Any]:
        completions = [item.completion for item in items]
        labels = [label_of(item, self._block) for item in items]
        match self._block.protocol:
            case "raylign":
                messages = [[dict(message) for message in item.prompt.messages] for item in items]
                return {"prompts": messages, "completions": completions, "labels": labels}
            case "openrlhf":
                prompts = [prompt_text(item.prompt, self._template) for item in items]
                query = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
                return {"query": query, "prompts": prompts, "labels": labels}

    def _scores(self, answer: Answer, wanted: int) -> list[_Answer]:
        try:
            values, reasons = self._read(answer.body)
        except ValidationError as error:
            shown = self._server.shown(answer.text)
            raise BadAnswer(f"answered with no list of scores: {shown}", of_content=True) from error
        if len(values) != wanted or len(reasons) != wanted:
            raise BadAnswer(
                f"answered with {len(values)} scores and {len(reasons)} reasons for {wanted} completions",
                again=False,
                of_content=True,
            )
        return [self._score_of(value, reason) for value, reason in zip(values, reasons, strict=True)]

    def _read(self, content: bytes) -> tuple[list[Any], list[str | None]]:
        match self._block.protocol:
            case "raylign":
                answer = _Scores.model_validate_json(content)
                no_reasons: list[str | None] = [None] * len(answer.scores)
                return answer.scores, no_reasons if answer.reasons is None else answer.reasons
            case "openrlhf":
                rewards = _Rewards.model_validate_json(content).rewards
                return [_unwrapped(reward) for reward in rewards], [None] * len(rewards)

    def _score_of(self, value: Any, reason: str | None) -> _Answer:
        if value is None:
            told = f": {self._server.shown(reason)}" if reason else ""
            return Score(None, reason=f"the service gave no score{told}"), False
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > sys.float_info.max:
            return Score(None, reason=f"answered {self._server.shown(_written(value))}, not a finite number"), True
        if math.isnan(value):
            return Score(None, reason="answered nan, not a finite number"), True
        return Score(float(value), reason=self._server.shown(reason) if reason else ""), False


def check_service(block: HttpScoringBlock) -> None:
    """Ask about one small item from this process. Raises ScorerError: not reached, key refused, no scores.

    A service may refuse the item itself, say for its missing label.
    """

    async def ask() -> None:
        key = api_key(block)
        async with connected(block, key) as http:
            await _Asking(block, key, http, Spending(), template_of(block), 0).ask([PROBE])

    try:
        asyncio.run(ask())
    except NoReply as failure:
        if isinstance(failure, BadAnswer) or not failure.of_content:
            refused = ScorerError(f"the reward service at {block.url}: {failure}")
            refused.cure = (
                "see that the service is up and answers as scoring.protocol says, then run the same command again"
            )
            raise refused from failure


def label_of(item: ScoringItem, block: HttpScoringBlock) -> object:
    """What is sent as the label of an item; null where the row has none."""
    return item.prompt.meta.get(block.label_column)


def prompt_text(prompt: Prompt, template: Template | None) -> str:
    """A prompt's messages as one text that ends where the answer begins. Raises ScorerError naming the prompt."""
    if template is None:
        return "".join(f"{message['content']}\n\n" for message in prompt.messages)
    try:
        return template.render(messages=[dict(message) for message in prompt.messages], add_generation_prompt=True)
    except TemplateError as error:
        raise ScorerError(
            f"scoring.chat_template fails on prompt {prompt.id} ({error}); correct the template"
        ) from error


def template_of(block: HttpScoringBlock) -> Template | None:
    """The chat template, if the block names one. Raises ScorerError when it cannot be read."""
    if block.chat_template is None:
        return None
    # As transformers reads chat templates.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    try:
        text = read_text(block.chat_template)
        require_bounded(text, f"scoring.chat_template={block.chat_template}", "correct it")
        return environment.from_string(text)
    except ModelError as error:
        raise ScorerError(str(error)) from error
    except (OSError, ValueError, TemplateError) as error:
        raise ScorerError(
            f"scoring.chat_template={block.chat_template} cannot be read ({error}); give a Jinja file in UTF-8"
        ) from error


def _refuse(message: str) -> None:
    """What chat templates call on conversations that they do not take."""
    raise TemplateError(message)


def _written(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "an integer of thousands of digits"


def _unwrapped(reward: Any) -> Any:
    """A reward model's head gives each text a list of one number, which some servers pass on."""
    return reward[0] if isinstance(reward, list) and len(reward) == 1 else reward


def _load(block: HttpScoringBlock, near: Near) -> ItemScorer:
    service = HttpScorer(block)
    template = [] if block.chat_template is None else [file_hash(block.chat_template)]
    return near.kept(
        block, service, amounts=service.amounts, contents=template, context=lambda item: label_of(item, block)
    )


def _describe(block: HttpScoringBlock, load: bool) -> tuple[str, ...]:
    check_service(block)
    return f"at {block.url}", f"protocol {block.protocol}"


def _longest_s(block: HttpScoringBlock, batch: Sequence[ScoringItem]) -> float:
    return asking_s(math.ceil(len(batch) / block.batch_size) + len(batch), block)


def _inputs(block: HttpScoringBlock) -> dict[str, Input]:
    if block.chat_template is None:
        return {}
    own = Input(fingerprint(block.chat_template).sha256, "the template", fixed=False)
    return {f"chat_template={block.chat_template}": own}


KIND: Kind[HttpScoringBlock] = Kind(_load, _describe, _longest_s, code=("http_service.py",), inputs=_inputs)
