"""From examples to texts by the chat template, to token ids, to Preferences of at most `max_length` tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from os.path import commonprefix
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from raylign.chunks import chunks
from raylign.config.offline import Rows
from raylign.data.examples import Completion, Example, answers, labels_of, scores_of, shown, tied
from raylign.models.open import TEMPLATE_ERRORS
from raylign.prompts.conversations import conversation
from raylign.prompts.tables import Fault
from raylign.records import Candidate, Message, Preference, Prompt

ANOTHER = "name another template in model.chat_template"
_SHOWN = 24

_BATCH = 256
Reason = Literal["ties", "prompt_too_long", "identical"]


@dataclass(frozen=True, slots=True)
class Templated:
    """An example as text. `wholes` has the prompt with each of `completions`, and begins with `prompt`."""

    example: Example
    messages: tuple[Message, ...]
    completions: tuple[Completion, ...]
    prompt: str
    """Ends with the generation prompt."""
    wholes: tuple[str, ...]


def templated(
    example: Example, tokenizer: PreTrainedTokenizerBase, rows: Rows, system: str | None, ends: Sequence[str]
) -> Templated | Fault:
    """The texts of the answers that `rows` asks for.

    A Fault where there are none; where the template refuses the conversation, leaves its tools out, or writes a prompt
    in another way once an answer follows, so that training would see another prompt than generation does; and where an
    answer holds one of `ends`, the tokens at which generation stops, in its own text.
    """
    completions = answers(example, rows)
    if isinstance(completions, Fault):
        return completions
    messages = conversation([*example.prompt], system)
    try:
        prompt = _text(tokenizer, messages, example.tools, generation=True)
        wholes = tuple(
            _text(tokenizer, (*messages, *completion.messages), example.tools, generation=False)
            for completion in completions
        )
    except TEMPLATE_ERRORS as error:
        # Templates add texts up: what is not there, such as the content of a call, is a TypeError.
        problem, cure = f"refused by the chat template ({error})", f"order roles as the model expects, or {ANOTHER}"
        return Fault(example.number, problem, shown(example), cure)
    one = Templated(example, messages, completions, prompt, wholes)
    problem, cure = _problem(one, ends)
    return Fault(example.number, problem, shown(example), cure) if problem else one


def _text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    *,
    generation: bool,
) -> str:
    turns: list[Any] = [dict(message) for message in messages]
    functions: list[Any] = [dict(tool) for tool in tools]
    text = tokenizer.apply_chat_template(
        turns, tools=functions or None, add_generation_prompt=generation, tokenize=False
    )
    assert isinstance(text, str)
    return text


def _problem(one: Templated, ends: Sequence[str]) -> tuple[str, str]:
    """(problem, cure) of texts that cannot be trained on; two empty strings if they can."""
    for whole, completion in zip(one.wholes, one.completions, strict=True):
        if not whole.startswith(one.prompt):
            return _parted(one.prompt, whole), f"{ANOTHER} that writes a prompt alike with and without its answer"
        if name := next((name for name in _called((*one.messages, *completion.messages)) if name not in whole), ""):
            return f"the chat template leaves out the call of {name}", f"{ANOTHER} that writes tool calls"
        said = [str(message.get("content") or "") for message in completion.messages]
        if end := next((end for end in ends for text in said if end in text), ""):
            return f"the answer holds {end}, at which generation stops, in its text", "take it out of the answer"
    if name := next((name for name in _offered(one.example.tools) if name not in one.prompt), ""):
        return f"the chat template leaves out the tool {name}", f"{ANOTHER} that writes tools, or remove them"
    return "", ""


def _parted(prompt: str, whole: str) -> str:
    at = len(commonprefix([prompt, whole]))
    alone, answered = (text[max(0, at - _SHOWN) : at + _SHOWN] for text in (prompt, whole))
    return f"the chat template writes {alone!r} in the prompt alone, but {answered!r} once an answer follows"


def _called(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        yield from _offered(message.get("tool_calls") or ())


def _offered(functions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Names of functions, bare or wrapped as chat templates expect them."""
    for function in functions:
        name = function.get("function", function).get("name")
        if name:
            yield name


@dataclass(frozen=True, slots=True)
class Tokenized:
    """An example in tokens; `ids` runs parallel to `completions`. `prompt` is what all of them follow.

    `apart`: an answer was tokenised without its prompt. `ended`: every answer has its end token.
    """

    example: Example
    messages: tuple[Message, ...]
    completions: tuple[Completion, ...]
    prompt: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    apart: bool
    ended: bool


def tokenized(
    examples: Iterator[Example | Fault],
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    system: str | None,
    ends: frozenset[int],
) -> Iterator[Tokenized | Fault]:
    """Each example in tokens, in order; a Fault where `raylign.data.tokens.templated` has one.

    The prompt is tokenised as generation does it, and the prompt with each completion as a whole; what follows the
    prompt is the completion. Where a token of the whole reaches over the prompt's end, so that the two share no such
    start, the completion is tokenised apart: training sees the very prompt that generation sees. (TRL cuts the prompt
    where the tokens part instead.) That is a Fault where the tokens read otherwise then, as with tokenizers that put a
    space before every text.

    A completion ends with the token of `ends` that its template writes. White space behind that, such as the newline
    of ChatML, is cut: generation has stopped by then. A template that writes no end gets none. `system` goes before
    conversations that have no system message.
    """
    texts = [token for token in tokenizer.convert_ids_to_tokens(sorted(ends)) if token]
    known: dict[int, int] = {}
    for batch in chunks(examples, _BATCH):
        made = [one if isinstance(one, Fault) else templated(one, tokenizer, rows, system, texts) for one in batch]
        wanted = [text for one in made if isinstance(one, Templated) for text in (one.prompt, *one.wholes)]
        ids = iter(_encoded(tokenizer, wanted))
        for one in made:
            if isinstance(one, Fault):
                yield one
            else:
                yield _split(one, list(islice(ids, 1 + len(one.wholes))), tokenizer, ends, known)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return found


def _split(
    one: Templated,
    ids: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    ends: frozenset[int],
    known: dict[int, int],
) -> Tokenized | Fault:
    """`known` makes equal ids one object: a data set has millions, of 28 bytes each."""
    prompt, wholes = ids[0], ids[1:]
    follows = [whole[: len(prompt)] == prompt for whole in wholes]
    apart = iter(
        _encoded(tokenizer, [w[len(one.prompt) :] for w, fits in zip(one.wholes, follows, strict=True) if not fits])
    )
    rests = [whole[len(prompt) :] if fits else next(apart) for whole, fits in zip(wholes, follows, strict=True)]
    if not prompt or not all(rests):
        nothing = f"the chat template gives no token for the {'answer' if prompt else 'prompt'}"
        return Fault(one.example.number, nothing, shown(one.example), ANOTHER)
    if not all(follows) and any(
        _read(tokenizer, [*prompt, *rest]) != _read(tokenizer, whole) for rest, whole in zip(rests, wholes, strict=True)
    ):
        problem = "a token reaches over the end of the prompt, and the answer tokenised apart reads otherwise"
        return Fault(one.example.number, problem, shown(one.example), f"{ANOTHER}: its prompt ends with a whole token")
    kept = [_up_to_end(rest, tokenizer, ends) for rest in rests]
    return Tokenized(
        example=one.example,
        messages=one.messages,
        completions=one.completions,
        prompt=tuple(map(known.setdefault, prompt, prompt)),
        ids=tuple(tuple(map(known.setdefault, rest, rest)) for rest in kept),
        apart=not all(follows),
        ended=all(rest[-1] in ends for rest in kept),
    )


def _read(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _up_to_end(ids: list[int], tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> list[int]:
    """Without white space behind the last end token."""
    last = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] in ends), None)
    if last is None or _read(tokenizer, ids[last + 1 :]).strip():
        return ids
    return ids[: last + 1]


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
