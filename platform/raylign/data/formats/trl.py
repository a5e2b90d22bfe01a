"""TRL's formats: preferences with explicit or implicit prompt, prompt-completion, messages; and lists of answers."""

from raylign.data.examples import SCORES, STRENGTHS, Completion
from raylign.data.formats.parts import (
    BadRow,
    Cells,
    Parts,
    answer_of,
    check_answer,
    check_text_only,
    number,
    pair,
    prompt_of,
    required,
    split_demonstration,
    system_of,
    tools_of,
    turns_of,
    used,
)
from raylign.prompts.conversations import conversation
from raylign.records import Message

COLUMNS = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("prompt", "completion"),
    ("prompt", "completions"),
    ("messages",),
)
EITHER_SCORE = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
OPTIONAL = ("system", "tools", "margin", "score_scale", *EITHER_SCORE[0], *EITHER_SCORE[1])


def parse(row: Cells) -> Parts:
    """One row in any of the shapes of `COLUMNS`; `tools`, `system` and scores are optional. Raises BadRow."""
    check_text_only(row)
    if "chosen" in row or "rejected" in row:
        return _preference(row)
    if "completions" in row:
        return _ranking(row)
    if "completion" in row:
        prompt = prompt_of(required(row, "prompt"), row.get("system"))
        answer = answer_of("completion", required(row, "completion"))
        return _demonstration(row, prompt, answer, ("prompt", "completion"))
    messages = turns_of("messages", required(row, "messages"))
    before, answer = split_demonstration("messages", messages)
    return _demonstration(row, conversation(list(before), system_of(row.get("system"))), answer, ("messages",))


def _demonstration(
    row: Cells, prompt: tuple[Message, ...], answer: tuple[Message, ...], columns: tuple[str, ...]
) -> Parts:
    return Parts(prompt, (Completion(answer),), True, used(row, (*columns, *OPTIONAL)), tools_of(row.get("tools")))


def _preference(row: Cells) -> Parts:
    chosen, rejected = required(row, "chosen"), required(row, "rejected")
    if type(chosen) is not type(rejected):
        kinds = f"{type(chosen).__name__} and {type(rejected).__name__}"
        raise BadRow(f"chosen and rejected are of different kinds: {kinds}", (chosen, rejected), "give both alike")
    if _is_implicit(row.get("prompt"), chosen):
        prompt, better, worse = _split(chosen, rejected)
        prompt = conversation(list(prompt), system_of(row.get("system")))
    else:
        prompt = prompt_of(row["prompt"], row.get("system"))
        better, worse = answer_of("chosen", chosen), answer_of("rejected", rejected)
    # A data set that has `messages` beside a pair repeats the chosen conversation there.
    columns = used(row, ("prompt", "chosen", "rejected", "messages", *OPTIONAL))
    return Parts(
        prompt, pair(better, worse, _scores(row)), True, columns, tools_of(row.get("tools")), scale=_scale(row)
    )


def _is_implicit(prompt: object, chosen: object) -> bool:
    """As TRL has it: a prompt in plain text beside whole conversations only repeats what they say."""
    return prompt is None or (isinstance(prompt, str) and isinstance(chosen, list) and _has_prompt(chosen))


def _has_prompt(messages: list[object]) -> bool:
    first = messages[0] if messages else None
    return not (isinstance(first, dict) and first.get("role") == "assistant")


def _split(chosen: object, rejected: object) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """(prompt, chosen, rejected) of two whole conversations or two whole texts."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        at = text_prefix(chosen, rejected)
        prompt = prompt_of(chosen[:at]) if chosen[:at].strip() else ()
        _require_prompt(prompt, (chosen, rejected))
        return prompt, answer_of("chosen", chosen[at:]), answer_of("rejected", rejected[at:])
    return split_turns(turns_of("chosen", chosen), turns_of("rejected", rejected))


def split_turns(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """(prompt, chosen, rejected) of two conversations: the prompt is what they share, up to the answers that differ."""
    if chosen == rejected:
        pair(chosen, rejected)
    at = 0
    while at < min(len(chosen), len(rejected)) and chosen[at] == rejected[at]:
        at += 1
    while at and chosen[at - 1]["role"] not in ("user", "tool"):
        at -= 1
    _require_prompt(chosen[:at], (list(chosen), list(rejected)))
    for name, turns in (("chosen", chosen[at:]), ("rejected", rejected[at:])):
        if not turns:
            raise BadRow(f"{name} has no answer of its own", list(chosen), "end with the assistant's answer")
        if turns[0]["role"] != "assistant" or any(turn["role"] not in ("assistant", "tool") for turn in turns):
            cure = "chosen and rejected may differ in the answer alone; correct or remove the row"
            raise BadRow("chosen and rejected differ before the last answer", (list(chosen), list(rejected)), cure)
        check_answer(name, turns)
    return chosen[:at], chosen[at:], rejected[at:]


def text_prefix(chosen: str, rejected: str) -> int:
    """Where two texts begin to differ, a space before it left to the answers, as TRL's `extract_prompt` cuts them."""
    at = 0
    while at < min(len(chosen), len(rejected)) and chosen[at] == rejected[at]:
        at += 1
    return at - 1 if at and chosen[at - 1] == " " else at


def _require_prompt(prompt: object, value: object) -> None:
    if not prompt:
        raise BadRow("chosen and rejected share no prompt", value, "begin both with the same prompt or add 'prompt'")


def _scores(row: Cells) -> tuple[float | None, float | None]:
    """Both scores, or a margin as a score above zero: only the difference counts then."""
    for names in EITHER_SCORE:
        given = [name for name in names if row.get(name) is not None]
        if len(given) == 1:
            raise BadRow(f"{given[0]} without its counterpart", row[given[0]], f"give {' and '.join(names)}")
        if given:
            return number(names[0], row[names[0]]), number(names[1], row[names[1]])
    if row.get("margin") is not None:
        return number("margin", row["margin"]), 0.0
    return None, None


def _scale(row: Cells) -> str:
    """As the row itself says, which a prepared file does; a margin is another thing than scores."""
    told = row.get("score_scale")
    if isinstance(told, str) and told:
        return told
    scored = any(row.get(name) is not None for names in EITHER_SCORE for name in names)
    return STRENGTHS if row.get("margin") is not None and not scored else SCORES


def _ranking(row: Cells) -> Parts:
    prompt = prompt_of(required(row, "prompt"), row.get("system"))
    given, scores = required(row, "completions"), row.get("scores")
    if not isinstance(given, list) or not given:
        raise BadRow("completions is no list of answers", given, "give a list with at least one answer")
    answers = [answer_of(f"completion {index}", answer) for index, answer in enumerate(given)]
    columns = used(row, ("prompt", "completions", "scores", *OPTIONAL))
    tools = tools_of(row.get("tools"))
    if scores is None:
        return Parts(prompt, tuple(Completion(answer) for answer in answers), True, columns, tools)
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise BadRow(f"scores is no list of {len(answers)} numbers", scores, "give one score for each completion")
    numbers = [number(f"score {index}", score) for index, score in enumerate(scores)]
    completions = [Completion(answer, score) for answer, score in zip(answers, numbers, strict=True)]
    # Equal scores give no order.
    ranked = len(set(numbers)) > 1 or len(numbers) == 1
    if ranked:
        completions.sort(key=lambda completion: -(completion.score or 0.0))
    return Parts(prompt, tuple(completions), ranked, columns, tools)
