"""IFEval: whether an answer follows instructions that a program can check (Zhou et al. 2023, arXiv 2311.07911).

As in the authors' code (google-research/instruction_following_eval), but for the language, which py3langid tells here
and langdetect there. Two of the 25 instructions need tokenizers of nltk that are downloaded first: they are
`UNCHECKED`, and rows that have them are not scored.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from raylign.records import Score

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool]
UNCHECKED = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
_CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCES = ("```json", "```Json", "```JSON", "```")


def read_instructions(cell: str) -> list[tuple[str, dict[str, Any]]]:
    """[(id, arguments)] of a cell as `raylign.prompts.published` writes it.

    Raises ValueError for a cell that is none, and for one with instructions that are not checked here, by name.
    """
    found = json.loads(cell)
    if not (isinstance(found, list) and found and all(_is_instruction(one) for one in found)):
        raise ValueError("not a list of instructions with their arguments")
    if unknown := [name for name, _ in found if name not in CHECKS]:
        why = "need nltk's data" if set(unknown) <= set(UNCHECKED) else "are not known here"
        raise ValueError(f"instructions that {why}: {', '.join(dict.fromkeys(unknown))}")
    return [(name, arguments) for name, arguments in found]


def _is_instruction(one: object) -> bool:
    return isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], dict)


def follows(instructions: Sequence[tuple[str, Arguments]], answer: str) -> Score:
    """1 where the answer follows every instruction strictly, else 0: accuracy at the level of prompts.

    `parts` has that as `prompt_strict`, `prompt_loose`, the shares of instructions that are followed as
    `instruction_strict` and `instruction_loose`, and how many `instructions` there are: accuracy at the level of
    instructions is the mean of shares weighted by them. Loosely is followed what any of eight variants of the answer
    follows: without its first line, its last one, both, and each without asterisks.
    """
    variants = _variants(answer)
    strict = [_checked(name, arguments, variants[:1]) for name, arguments in instructions]
    loose = [_checked(name, arguments, variants) for name, arguments in instructions]
    parts = {
        "prompt_strict": float(all(strict)),
        "prompt_loose": float(all(loose)),
        "instruction_strict": sum(strict) / len(strict),
        "instruction_loose": sum(loose) / len(loose),
        "instructions": float(len(strict)),
    }
    return Score(parts["prompt_strict"], parts)


def _checked(name: str, arguments: Arguments, variants: Sequence[str]) -> bool:
    """Raises KeyError for an argument that is not there."""
    return any(variant.strip() and CHECKS[name](variant, arguments) for variant in variants)


def _variants(answer: str) -> list[str]:
    """The answer first."""
    lines = answer.split("\n")
    kept = (lines, lines[1:], lines[:-1], lines[1:-1])
    cut = [answer, *("\n".join(part).strip() for part in kept[1:])]
    return [text.replace("*", "") if plain else text for plain, text in product((False, True), cut)]


def _related(count: int, arguments: Arguments, number: str, relation: str = "relation") -> bool:
    wanted = int(arguments[number])
    match arguments[relation]:
        case "less than":
            return count < wanted
        case "at least":
            return count >= wanted
        case other:
            raise ValueError(f"{relation}={other!r}; known: less than, at least")


def _found(pattern: str, text: str) -> list[str]:
    return re.findall(pattern, text, re.IGNORECASE)


def _letters(text: str, arguments: Arguments) -> bool:
    count = Counter(text.lower())[str(arguments["letter"]).lower()]
    return _related(count, arguments, "let_frequency", "let_relation")


def _parts(text: str, pattern: str) -> list[str] | None:
    """What stands between dividers; empty parts may stand at the ends alone, else None."""
    parts = re.split(pattern, text)
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return [part for part in parts if part.strip()]


def _paragraphs(text: str, arguments: Arguments) -> bool:
    parts = _parts(text, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == int(arguments["num_paragraphs"])


def _two_answers(text: str, arguments: Arguments) -> bool:
    parts = _parts(text, re.escape("******"))
    return parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()


def _first_word(text: str, arguments: Arguments) -> bool:
    paragraphs = re.split(r"\n\n", text)
    count, nth = sum(bool(part.strip()) for part in paragraphs), int(arguments["nth_paragraph"])
    if nth > count or not (paragraph := paragraphs[nth - 1].strip()):
        return False
    word = re.split(r"[.,?!'\"]", paragraph.split()[0].lstrip("'").lstrip('"'))[0]
    return count == int(arguments["num_paragraphs"]) and word.lower() == str(arguments["first_word"]).lower()


def _postscript(text: str, arguments: Arguments) -> bool:
    marker = str(arguments["postscript_marker"]).strip()
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    return bool(re.findall(known.get(marker, rf"\s*{marker.lower()}.*$"), text.lower(), re.MULTILINE))


def _bullets(text: str, arguments: Arguments) -> bool:
    stars, dashes = (re.findall(p, text, re.MULTILINE) for p in (r"^\s*\*[^\*].*$", r"^\s*-.*$"))
    return len(stars) + len(dashes) == int(arguments["num_bullets"])


def _highlights(text: str, arguments: Arguments) -> bool:
    single = [one for one in re.findall(r"\*[^\n\*]*\*", text) if one.strip("*").strip()]
    double = [one for one in re.findall(r"\*\*[^\n\*]*\*\*", text) if one[2:-2].strip()]
    return len(single) + len(double) >= int(arguments["num_highlights"])


def _sections(text: str, arguments: Arguments) -> bool:
    # The authors' own spelling of the argument.
    parts = re.split(rf"\s?{arguments['section_spliter']}\s?\d+\s?", text)
    return len(parts) - 1 >= int(arguments["num_sections"])


def _is_json(text: str, arguments: Arguments) -> bool:
    text = text.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _titled(text: str, arguments: Arguments) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _starts(text: str, arguments: Arguments) -> bool:
    return text.strip().lower().startswith(str(arguments["prompt_to_repeat"]).strip().lower())


def _ends(text: str, arguments: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(str(arguments["end_phrase"]).strip().lower())


def _quoted(text: str, arguments: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _language(text: str) -> str:
    from py3langid import classify  # noqa: PLC0415 - its model takes a second to load, and few checks need it

    return str(classify(text)[0])


CHECKS: Mapping[str, Check] = {
    "keywords:existence": lambda text, a: all(_found(word, text) for word in a["keywords"]),
    "keywords:frequency": lambda text, a: _related(len(_found(str(a["keyword"]), text)), a, "frequency"),
    "keywords:forbidden_words": lambda text, a: not any(_found(rf"\b{word}\b", text) for word in a["forbidden_words"]),
    "keywords:letter_frequency": _letters,
    "language:response_language": lambda text, a: _language(text) == a["language"],
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda text, a: _related(len(re.findall(r"\w+", text)), a, "num_words"),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda text, a: (
        len(re.findall(r"\[.*?\]", text)) >= int(a["num_placeholders"])
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text, a: any(choice in text for choice in _CHOICES),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _titled,
    "combination:two_responses": _two_answers,
    "combination:repeat_prompt": _starts,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:english_capital": lambda text, a: text.isupper() and _language(text.lower()) == "en",
    "change_case:english_lowercase": lambda text, a: text.islower() and _language(text) == "en",
    "punctuation:no_comma": lambda text, a: "," not in text,
}
"""By id; arguments have the names of the published rows."""
