"""Scores from a language model: candidates of one prompt are compared in pairs, one that stands alone is rated."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

from raylign.boundary.secrets import without_secrets
from raylign.config.scoring import JudgeScoringBlock
from raylign.records import Prompt, Score
from raylign.report.text import one_line
from raylign.scoring.base import Group, ItemScorer, ScoringItem, groups, most_unscored, skipped
from raylign.scoring.cache import Texts, Verdict, Verdicts
from raylign.scoring.http_client import NoReply, api_key, asking_s
from raylign.scoring.judge_client import (
    QUESTIONS,
    REASONED_TOKENS,
    JudgeClient,
    JudgeSpending,
    check_judge,
    connected,
    require_answering_judge,
    require_sound_judge,
)
from raylign.scoring.judge_prompt import FIRST, RATINGS, TIE, Question, how_good, which_is_better
from raylign.scoring.kind import Kind, Near, identity
from raylign.scoring.usage import MeasuredScorer, Usage

log = logging.getLogger(__name__)
_LONGEST_REASON = 2000
"""Characters of what the comparisons of one candidate say."""
_NAMED = 40
"""Characters by which the other candidate is named, at most."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two verdicts on one pair. `share` of the win goes to the first (1, 1/2 or 0); without verdicts there is none.

    `reason` is the judge's where the first is called A, `other_reason` where the second is; empty if it gives none.
    """

    share: float
    disagreed: bool
    reason: str = ""
    other_reason: str = ""

    @property
    def reversed(self) -> "Comparison":
        return Comparison(1.0 - self.share, self.disagreed, self.other_reason, self.reason)

    def told(self, other: str) -> str:
        """The reason as the first candidate's own: there it is A. `other` is the second's text."""
        if not self.reason:
            return ""
        # Only the whole of a secret looks like one.
        named = one_line(without_secrets(other[: 20 * _NAMED]), _NAMED)
        start = f'A is this answer, B "{named}"'
        if self.disagreed:
            return f"{start}. Tie: the two orders disagree. {self.reason} [with this answer as B:] {self.other_reason}"
        verdict = "Tie" if self.share == 0.5 else "A wins" if self.share > 0.5 else "B wins"
        return f"{start}. {verdict}: {self.reason}"


EQUAL = Comparison(0.5, disagreed=False)
"""Answers with the same text, which nobody is asked about."""
Outcome = Comparison | NoReply


class JudgeScorer:
    """Asks a judge about the items of one prompt that stand together.

    Two or more are compared, each with each, in both orders. The two verdicts must agree, else the comparison is a
    tie, so that a judge who prefers a position, or is told to take "A", decides nothing. A score is the mean share of
    wins (a tie is half a win) over the comparisons that have both verdicts, in 0..1, and only means something beside
    the other candidates of its prompt; without any comparison the candidate is unscored. `parts` has `comparisons`,
    `disagreements` and `missing`. A judge that gives reasons is quoted as it spoke when the candidate was A, once for
    each comparison, a line each; the other candidate is named by how it begins.

    One item alone is rated from 1 to 10; its score is (rating - 1) / 9, and `parts` has `rating`. No second order
    protects a rating: what it serves (held-out evaluation) is never trained on. Its reason is the judge's.
    """

    def __init__(self, block: JudgeScoringBlock, verdicts: Verdicts | None = None, usage: Usage | None = None) -> None:
        """Asks nothing yet. Raises ScorerError when the key cannot be sent.

        What `verdicts` has is not asked, and what is answered is kept there; items that nothing was asked about are
        counted in `usage`.
        """
        self.spent = JudgeSpending()
        self._verdicts = Verdicts(None, "") if verdicts is None else verdicts
        self._usage = Usage() if usage is None else usage
        self._block, self._key = block, api_key(block)
        self._met = False

    def score(self, items: Sequence[ScoringItem], allowed: int | None = None) -> list[Score]:
        """One score per item, in order. Stops asking once more than `allowed` of `items` are unscored.

        By default that is a share of `max_unscored`. The first call that has something to ask meets the judge before
        it scores anything, and raises ScorerError: not reached, key refused, model not known, canaries failed.
        """
        limit = most_unscored(len(items), self._block.max_unscored) if allowed is None else allowed
        before = self.spent.copy()
        try:
            return asyncio.run(self._score(groups(items), limit))
        finally:
            if (spent := self.spent.since(before)).requests:
                self._log_cost(spent)

    def amounts(self) -> dict[str, float]:
        """What was spent so far, by the names of metrics; `cost_usd` where the block has prices."""
        spent, block = self.spent, self._block
        found: dict[str, float] = {
            "requests": spent.requests,
            "failed_requests": spent.failures,
            "comparisons": spent.comparisons,
            "disagreements": spent.disagreements,
            "tokens": spent.tokens,
        }
        if block.price_in is None or block.price_out is None:
            return found
        # An answer that does not tell its tokens apart costs nothing here.
        return found | {"cost_usd": (spent.tokens_in * block.price_in + spent.tokens_out * block.price_out) / 1e6}

    def close(self) -> None:
        """Nothing is kept open between calls."""

    async def _score(self, units: Sequence[Group], allowed: int) -> list[Score]:
        keys = [[self._verdicts.key(group[0].prompt, texts) for texts in _questions(group)] for group in units]
        known = self._verdicts.known([key for own in keys for key in own])
        settled = [bool(own) and known.keys() >= set(own) for own in keys]
        self._usage.cache_hits += sum(
            len(group) for group, is_settled in zip(units, settled, strict=True) if is_settled
        )
        async with connected(self._block, self._key, self.spent) as client:
            if any(own and not is_settled for own, is_settled in zip(keys, settled, strict=True)):
                await self._meet(client)
            hearing = _Hearing(self._block, client, self._verdicts, known, allowed)
            found = await asyncio.gather(*(hearing.judge(group) for group in units))
        return [score for scores in found for score in scores]

    async def _meet(self, client: JudgeClient) -> None:
        if self._met:
            return
        await (require_sound_judge if self._block.canaries else require_answering_judge)(client, self._block)
        self._met = True

    def _log_cost(self, spent: JudgeSpending) -> None:
        log.info(
            "judge %s: %d requests, %d of them without a verdict; %d comparisons, %d of them disagreed; "
            "%d tokens (%d answers without usage)",
            self._block.model,
            spent.requests,
            spent.failures,
            spent.comparisons,
            spent.disagreements,
            spent.tokens,
            spent.unmetered,
        )


def _questions(group: Group) -> list[Texts]:
    """All that is asked about a group: a rating, or both orders of every two different answers."""
    texts = list(dict.fromkeys(item.completion for item in group))
    return [(texts[0],)] if len(group) == 1 else list(permutations(texts, 2))


def _question(prompt: Prompt, texts: Texts, block: JudgeScoringBlock) -> Question:
    if len(texts) == 1:
        return how_good(prompt.messages, texts[0], block.criterion, reasons=block.reasons)
    return which_is_better(prompt.messages, texts[0], texts[1], block.criterion, reasons=block.reasons)


class _Hearing:
    """One call's groups, of whose items `allowed` may stay unscored before nothing is asked any more."""

    def __init__(
        self,
        block: JudgeScoringBlock,
        client: JudgeClient,
        verdicts: Verdicts,
        known: Mapping[bytes, Verdict],
        allowed: int,
    ) -> None:
        self._block, self._client, self._allowed = block, client, allowed
        self._verdicts, self._known = verdicts, known
        self._pending: dict[bytes, Verdict] = {}
        self._writing = asyncio.Lock()
        self._unscored = 0

    async def judge(self, group: Sequence[ScoringItem]) -> list[Score]:
        prompt, texts = group[0].prompt, [item.completion for item in group]
        scores = [await self._rate(prompt, texts[0])] if len(texts) == 1 else await self._compare_all(prompt, texts)
        self._unscored += sum(score.value is None for score in scores)
        if self._unscored > self._allowed:
            self._client.stop(skipped(self._block.max_unscored).reason)
        return scores

    async def _rate(self, prompt: Prompt, text: str) -> Score:
        rating = await self._answer(prompt, (text,))
        if isinstance(rating, NoReply):
            return Score(None, reason=str(rating))
        return Score((rating.value - 1) / (len(RATINGS) - 1), {"rating": rating.value}, rating.reason)

    async def _compare_all(self, prompt: Prompt, texts: Sequence[str]) -> list[Score]:
        pairs = list(combinations(dict.fromkeys(texts), 2))
        outcomes = await asyncio.gather(*(self._compare(prompt, first, second) for first, second in pairs))
        table: dict[tuple[str, str], Outcome] = {}
        for (first, second), outcome in zip(pairs, outcomes, strict=True):
            table[first, second] = outcome
            table[second, first] = outcome.reversed if isinstance(outcome, Comparison) else outcome
        return [
            _score_of([(other, table.get((text, other), EQUAL)) for at, other in enumerate(texts) if at != place])
            for place, text in enumerate(texts)
        ]

    async def _compare(self, prompt: Prompt, first: str, second: str) -> Outcome:
        """Both orders; the comparison is missing when either has no verdict."""
        orders = ((first, second), (second, first))
        one, other = await asyncio.gather(*(self._answer(prompt, texts) for texts in orders))
        if isinstance(one, NoReply):
            return one
        if isinstance(other, NoReply):
            return other
        disagreed = one.value != 1.0 - other.value
        if any(self._verdicts.key(prompt, texts) not in self._known for texts in orders):
            self._client.spending.comparisons += 1
            self._client.spending.disagreements += disagreed
        return Comparison(0.5 if disagreed else one.value, disagreed, one.reason, other.reason)

    async def _answer(self, prompt: Prompt, texts: Texts) -> Verdict | NoReply:
        """The verdict, known or asked for: a rating of one text, of two the share of the win that goes to the first."""
        key = self._verdicts.key(prompt, texts)
        if key in self._known:
            return self._known[key]
        try:
            said = await self._client.ask(lambda: _question(prompt, texts, self._block))
        except NoReply as failure:
            return failure
        choice = said.choice
        value = float(choice) if len(texts) == 1 else 0.5 if choice == TIE else float(choice == FIRST)
        verdict = Verdict(value, said.reason)
        await self._keep(key, verdict)
        return verdict

    async def _keep(self, key: bytes, verdict: Verdict) -> None:
        """On disk before it counts; what is answered while another one is written goes there together."""
        self._pending[key] = verdict
        async with self._writing:
            waiting, self._pending = self._pending, {}
            await asyncio.to_thread(self._verdicts.keep, waiting)


def _score_of(outcomes: Sequence[tuple[str, Outcome]]) -> Score:
    """The score of one candidate from its comparisons with every other one, each beside the other's text."""
    missing = [outcome for _, outcome in outcomes if isinstance(outcome, NoReply)]
    made = [outcome for _, outcome in outcomes if isinstance(outcome, Comparison)]
    if missing and all(outcome is EQUAL for outcome in made):
        return Score(None, reason=str(missing[0]))
    parts = {
        "comparisons": float(len(made)),
        "disagreements": float(sum(outcome.disagreed for outcome in made)),
        "missing": float(len(missing)),
    }
    told = dict.fromkeys(outcome.told(other) for other, outcome in outcomes if isinstance(outcome, Comparison))
    return Score(sum(outcome.share for outcome in made) / len(made), parts, _lines([line for line in told if line]))


def _lines(told: Sequence[str]) -> str:
    """One under the other, as many as there is room for."""
    kept: list[str] = []
    for number, line in enumerate(told):
        if sum(map(len, kept)) + len(line) > _LONGEST_REASON:
            kept.append(f"[and {len(told) - number} more]")
            break
        kept.append(line)
    return "\n".join(kept)


def questions(batch: Sequence[ScoringItem]) -> int:
    """Questions about a batch at most, without retries: one for a single item, both orders of every pair of more."""
    return sum(max(1, len(group) * (len(group) - 1)) for group in groups(batch))


def _load(block: JudgeScoringBlock, near: Near) -> ItemScorer:
    judge = JudgeScorer(block, Verdicts(near.cache, identity(block)), near.usage)
    return MeasuredScorer(judge, near.usage, judge.amounts)


def _describe(block: JudgeScoringBlock, load: bool) -> tuple[str, ...]:
    check_judge(block)
    facts = (f"at {block.base_url}", f"criterion: {block.criterion}")
    if not block.reasons:
        return facts
    cost = "" if block.price_out is None else f" (${REASONED_TOKENS * block.price_out / 1e6:.2g})"
    return *facts, f"gives a reason before each choice: at most {REASONED_TOKENS} tokens{cost} an answer"


def _longest_s(block: JudgeScoringBlock, batch: Sequence[ScoringItem]) -> float:
    return asking_s(questions(batch) + (2 * len(QUESTIONS) + 1 if block.canaries else 1), block)


KIND: Kind[JudgeScoringBlock] = Kind(_load, _describe, _longest_s, code=("judge_prompt.py",))
