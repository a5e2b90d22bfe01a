"""Sums with a right result among close wrong ones, the same in every run."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

SEED = 20_240
"""Of the task `arithmetic`: runs compare only where they are asked the same."""
COUNT = 100
_CHOICES = 4


@dataclass(frozen=True, slots=True)
class Sum:
    """A question whose answer is a number; `choices[answer]` is right."""

    text: str
    choices: tuple[str, ...]
    answer: int


Made = tuple[str, int, tuple[int, ...]]
"""A question, its result, and results of likely mistakes."""


def arithmetic_sums(number: int = COUNT, seed: int = SEED) -> tuple[Sum, ...]:
    """In turn an addition, a subtraction, a multiplication and a word problem of two steps, no two alike.

    In every four of them each place has the right result once.
    """
    rng = random.Random(seed)
    kinds: tuple[Callable[[random.Random], Made], ...] = (_addition, _subtraction, _multiplication, _word_problem)
    found: dict[str, Sum] = {}
    for index in range(number):
        text, right, slips = next(made for _ in count() if (made := kinds[index % 4](rng))[0] not in found)
        place = (index + index // 4) % _CHOICES
        found[text] = Sum(text, _placed(right, _wrong(right, slips, rng), place), place)
    return tuple(found.values())


def _placed(right: int, wrong: Sequence[int], place: int) -> tuple[str, ...]:
    return tuple(map(str, (*wrong[:place], right, *wrong[place:])))


def _wrong(right: int, slips: Sequence[int], rng: random.Random) -> list[int]:
    """Three that are close: a likely mistake if there is one, then those that are off by one, two or ten."""
    likely = [slip for slip in dict.fromkeys(slips) if slip != right and slip >= 0]
    near = [value for gap in (1, 2, 10) for value in (right - gap, right + gap) if value >= 0 and value not in likely]
    chosen = rng.sample(likely, min(1, len(likely)))
    chosen += rng.sample(near, _CHOICES - 1 - len(chosen))
    rng.shuffle(chosen)
    return chosen


def _addition(rng: random.Random) -> Made:
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    return f"What is {a} + {b}?", a + b, (a + b + 100, a + b - 10)


def _subtraction(rng: random.Random) -> Made:
    a, b = sorted((rng.randint(11, 99), rng.randint(11, 99)), reverse=True)
    return f"What is {a} - {b}?", a - b, (a + b, a - b + 10)


def _multiplication(rng: random.Random) -> Made:
    a, b = rng.randint(3, 12), rng.randint(3, 12)
    return f"What is {a} x {b}?", a * b, (a * b + a, a * b - b, a + b)


def _word_problem(rng: random.Random) -> Made:
    """The result of the first step alone is a likely mistake."""
    a, b, c = rng.randint(12, 40), rng.randint(3, 9), rng.randint(2, 9)
    n, each, pay = rng.randint(3, 9), rng.randint(3, 9), rng.randint(8, 14)
    apples = f"Tom has {a} apples. He buys {b} more and gives away {c}. How many apples has he now?"
    pens = f"A box holds {each} pens. Mia has {n} boxes and {c} loose pens. How many pens has she?"
    coins = f"Ann earns {pay} coins a day. She works {n} days and spends {c} coins. How many coins are left?"
    birds = f"There are {a} birds in a tree. {b} fly away and {c} come back. How many birds are there now?"
    books = f"{n} children have {each} books each. They give {c} books away. How many books are left?"
    text, first, right = rng.choice(
        (
            (apples, a + b, a + b - c),
            (pens, each * n, each * n + c),
            (coins, pay * n, pay * n - c),
            (birds, a - b, a - b + c),
            (books, n * each, n * each - c),
        )
    )
    return text, right, (first,)
