"""Prompts without a pair get more candidates: what is asked about them, and what their scores mean then."""

import random
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import pytest

from raylign.config import OnlineDpoConfig, parse_config
from raylign.records import Candidate, Prompt, Score
from raylign.sampling.curriculum import History, filled_in, joined, regrouped, scores_by_place
from raylign.scoring.usage import Usage
from recipes.online_dpo import run_round
from tests.fakes import FakeEngine, FakeScorer
from tests.unit.run.test_round import HELD_OUT, Desk, Open, open_desk, prompts

__all__ = ["open_desk"]
NAMES = [f"p{number}" for number in range(80)]
JUDGE = {"type": "judge", "base_url": "http://judge/v1", "model": "judge-1"}


class Moody(FakeEngine):
    """Answers to a prompt that are mostly as good as each other; the words around tell them apart."""

    def _candidate(self, prompt: Prompt, index: int, weights: int, version: int, seed: int) -> Candidate:
        rng = random.Random(f"{prompt.id}/{seed}")
        usual = random.Random(prompt.id).randrange(4)
        words = ["good"] * (usual if rng.random() < 0.7 else rng.randrange(4))
        text = " ".join([*words, *("x" * rng.randint(5, 60) for _ in range(4))])
        token_ids = tuple(len(word) for word in text.split())
        return Candidate(prompt.id, index, token_ids, (-1.0,) * len(token_ids), text, "stop", version, seed)


class Judge(FakeScorer):
    """Compares the candidates of a prompt without noise: a score is the share of wins among them."""

    def score(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        advance: Callable[[int], None] = lambda items: None,
    ) -> list[Score]:
        groups = [[*group] for _, group in groupby(candidates, key=lambda candidate: candidate.prompt_id)]
        self._usages = {"judge": Usage([(len(candidates), 2.0)])}
        self._events.append(f"score {len(candidates)}")
        return [Score(_share(one, group)) for group in groups for one in group]


def _share(one: Candidate, group: Sequence[Candidate]) -> float:
    if len(group) == 1:
        return 1.0
    wins = [(quality(one) > quality(other)) + (quality(one) == quality(other)) / 2 for other in group]
    return (sum(wins) - 0.5) / (len(group) - 1)


def quality(candidate: Candidate) -> int:
    return candidate.text.count("good")


def judging(folder: Path, *overrides: str) -> OnlineDpoConfig:
    base = {"scoring": JUDGE, "sampling": {"num_generations": 4, "max_resamples": 2}, "run": {"seed": 7}}
    return parse_config(base, [f"run.dir={folder}/runs", *overrides])


def judged_round(open_desk: Open, config: OnlineDpoConfig) -> Desk:
    desk = open_desk(config, engine=Moody)
    desk.team = type(desk.team)(
        desk.team.generators, desk.team.trainers, Judge(desk.events, config.scoring), desk.team.publisher
    )
    run_round(desk.log(1), prompts(*NAMES), HELD_OUT, desk.team, config)
    return desk


@pytest.mark.parametrize("kind", ["all_pairs", "best_random", "best_worst"])
def test_a_judge_without_noise_orders_every_pair_rightly(open_desk: Open, tmp_path: Path, kind: str) -> None:
    """Scores among other candidates do not compare: of groups put together, shares of wins were far off."""
    desk = judged_round(open_desk, judging(tmp_path, f"pairing.type={kind}"))
    pairs = [(row["chosen"], row["rejected"], max(row["indices"])) for row in desk.rows(1, "preferences")]  # type: ignore[call-overload]
    assert sum(latest >= 4 for _, _, latest in pairs) >= 10, "pairs of candidates from several attempts"
    inverted = [pair for pair in pairs if str(pair[0]).count("good") <= str(pair[1]).count("good")]
    assert inverted == []


def test_a_scorer_that_compares_gets_whole_groups_and_another_one_new_candidates(
    open_desk: Open, tmp_path: Path
) -> None:
    compared = judged_round(open_desk, judging(tmp_path, "run.name=judged"))
    first, *later = [int(event.split()[1]) for event in compared.events if event.startswith("score")][:3]
    alone = open_desk(
        parse_config(
            judging(tmp_path).model_dump(mode="json") | {"scoring": {}, "run": {"seed": 7}},
            [f"run.dir={tmp_path}/runs"],
        ),
        engine=Moody,
    )
    run_round(alone.log(1), prompts(*NAMES), HELD_OUT, alone.team, alone.config)
    same, *fewer = [int(event.split()[1]) for event in alone.events if event.startswith("score")][:3]
    # Both leave the same prompts without a pair: all candidates are equally good.
    assert first == same == 4 * len(NAMES)
    assert later == [count * attempt for count, attempt in zip(fewer, (2, 3), strict=True)]


def test_the_file_of_an_attempt_has_whole_groups(open_desk: Open, tmp_path: Path) -> None:
    desk = judged_round(open_desk, judging(tmp_path))
    first, second = desk.rows(1, "candidates"), desk.rows(1, "candidates-1")
    again = {row["prompt_id"] for row in second}
    kept = [row["text"] for row in first if row["prompt_id"] in again]
    assert again and [row["text"] for row in second if row["index"] < 4] == kept  # type: ignore[operator]
    assert {row["index"] for row in second} == set(range(8))
    (outcomes,) = History(desk.run.directory).before(2)
    latest = {row["prompt_id"]: [] for row in first}  # type: ignore[var-annotated]
    for name in ("candidates", "candidates-1", "candidates-2"):
        rows = desk.rows(1, name)
        latest |= {row["prompt_id"]: [] for row in rows}
        for row in rows:
            latest[row["prompt_id"]].append(row["score"])
    assert {outcome.prompt_id: [*outcome.scores] for outcome in outcomes} == latest


def candidate(prompt_id: str, index: int, text: str) -> Candidate:
    return Candidate(prompt_id, index, (1,), (0.0,), text, "stop", 0, 0)


def test_groups_are_joined_and_put_back_in_the_order_of_the_prompts() -> None:
    old = [candidate("a", 0, "a0"), candidate("a", 1, "a1"), candidate("b", 0, "b0"), candidate("c", 0, "c0")]
    scores = [Score(float(number)) for number in range(4)]
    group = joined(prompts("c", "a"), old, [candidate("c", 0, "c1"), candidate("a", 0, "a2")])
    assert [(one.prompt_id, one.index, one.text) for one in group] == [
        ("c", 0, "c0"),
        ("c", 1, "c1"),
        ("a", 0, "a0"),
        ("a", 1, "a1"),
        ("a", 2, "a2"),
    ]
    found = filled_in(group, scores_by_place(old, scores), [Score(8.0), Score(9.0)])
    assert [score.value for score in found] == [3, 8, 0, 1, 9]
    candidates, values = regrouped((old, scores), (group, found))
    assert [one.text for one in candidates] == ["a0", "a1", "a2", "b0", "c0", "c1"]
    assert [score.value for score in values] == [0, 1, 9, 2, 3, 8]


def test_whether_a_score_depends_on_the_group_is_told_by_the_config() -> None:
    alone, judge = "{type: verifier}", "{type: judge, base_url: 'http://h/v1', model: m}"
    nested = f"{{type: weighted, scorers: {{c: {judge}}}, weights: {{c: 1}}}}"
    for scoring, compares in (
        (alone, False),
        (judge, True),
        (f"{{type: gate, gate: {alone}, score: {judge}}}", True),
        (f"{{type: min, scorers: {{a: {alone}, b: {nested}}}}}", True),
        (f"{{type: min, scorers: {{a: {alone}, b: {alone}}}}}", False),
        (f"{{type: calibrated, slope: 1, scorer: {alone}}}", True),
    ):
        assert parse_config({}, [f"scoring={scoring}"]).scoring.compares == compares
