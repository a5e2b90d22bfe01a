"""From an example in tokens to a Preference of at most `max_length` tokens a candidate."""

from typing import Literal

from transformers import PreTrainedTokenizerBase

from raylign.data.answers import labels_of, scores_of, tied
from raylign.data.examples import Completion
from raylign.data.tokens import Tokenized
from raylign.records import Candidate, Preference, Prompt

Reason = Literal["ties", "prompt_too_long", "identical"]


def preference(item: Tokenized, max_length: int, tokenizer: PreTrainedTokenizerBase) -> Preference | Reason:
    """Completions are cut at their end; or the reason why the row, which is not malformed, is left out.

    An answer with the tokens of a better one says nothing and is left out; so is a row that keeps no two of several.
    """
    if tied(item.completions):
        return "ties"
    room = max_length - len(item.prompt)
    if room <= 0:
        return "prompt_too_long"
    distinct = {ids[:room]: place for place, ids in reversed([*enumerate(item.ids)])}
    places = sorted(distinct.values())
    if len(places) < min(2, len(item.ids)):
        return "identical"
    completions = tuple(item.completions[place] for place in places)
    prompt = Prompt(f"t{item.example.number:06d}", item.messages, item.prompt, labels_of(item.example, completions))
    candidates = tuple(
        _candidate(prompt.id, index, completion, item.ids[place], room, tokenizer)
        for index, (place, completion) in enumerate(zip(places, completions, strict=True))
    )
    return Preference(prompt, candidates, scores_of(completions), (1.0,) * len(candidates))


def _candidate(
    prompt_id: str,
    index: int,
    completion: Completion,
    ids: tuple[int, ...],
    room: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Candidate:
    """`text` is the message; of a cut answer, or one that called tools on the way, what its tokens say."""
    is_whole = len(ids) <= room
    is_message = is_whole and len(completion.messages) == 1 and not completion.messages[0].get("tool_calls")
    text = (
        completion.messages[0]["content"]
        if is_message
        else tokenizer.decode(list(ids[:room]), skip_special_tokens=True)
    )
    return Candidate(
        prompt_id=prompt_id,
        index=index,
        token_ids=ids[:room],
        logprobs=(),
        text=str(text),
        finish_reason="stop" if is_whole else "length",
        policy_version=0,
        seed=0,
    )
