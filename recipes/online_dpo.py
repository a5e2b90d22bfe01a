"""Online DPO (Rafailov et al. 2023, on the policy's own samples): the whole loop on one screen.

Run it with `raylign run recipes/sentiment_smollm2.yaml`, or copy this file and edit the round. Every stage leaves a
file before the next one starts; run again, it goes on at the first stage that is not finished.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from raylign.config import OnlineDpoConfig, load_config
from raylign.config.evaluation import EvaluationBlock
from raylign.evaluation.guard import guarded
from raylign.evaluation.health import round_health
from raylign.evaluation.held_out import evaluate, with_gold
from raylign.evaluation.win_rate import VersionRates, against_versions
from raylign.export.card import Method, loss_name, public_name
from raylign.pairing import (
    PairingResult,
    build_preferences,
    require_preferences,
    with_policy_samples,
    without_pair,
)
from raylign.prompts import PromptSet, draw
from raylign.records import AnyEvaluation, Candidate, Completions, Preference, Prompt, RoundReport, Score
from raylign.reference.versions import is_initial_reference
from raylign.report.tables import Sample
from raylign.review.waiting import require_answers, with_answers
from raylign.roles import Team
from raylign.run.rounds import RoundLog, numbered
from raylign.sampling.curriculum import (
    NOTHING_KNOWN,
    History,
    Place,
    attempt_seed,
    draw_open,
    filled_in,
    joined,
    place,
    regrouped,
    scores_by_place,
)
from raylign.sampling.decoding import evaluation_decoding, policy_versions, training_decoding
from raylign.scoring.base import check_unscored
from raylign.scoring.load import public_scorer
from recipes.capability import report_with_capability, with_capability
from recipes.commands.failures import as_script
from recipes.commands.plan_online import show_plan
from recipes.opening import online_run
from recipes.recipe import Recipe
from recipes.run import Run, finished_before, train_steps


def run_round(
    log: RoundLog,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    team: Team,
    config: OnlineDpoConfig,
) -> tuple[RoundReport, list[Sample]]:
    """Round `index` trains policy version `index` from samples of version `index - 1`."""
    candidates = sample(log, prompts, team, config)
    scores = score(log, prompts, candidates, team, config)
    candidates, scores = sample_again(log, prompts, candidates, scores, team, config)
    pairing = prefer(log, prompts, candidates, scores, config)
    preferences = reference(log, prompts, candidates, pairing, team, config)
    steps = train_steps(log, preferences, team.trainers, config)
    sync = publish(log, team)
    evaluation, samples = evaluate_policy(log, held_out, team, config)
    scoring, health = log.read_scoring(), round_health(steps, config.loss)
    done = (pairing.counts, tuple(steps), sync, evaluation, log.seconds, scoring, health)
    return RoundReport(log.index, log.index, *done), samples


def sample(
    log: RoundLog, prompts: Sequence[Prompt], team: Team, config: OnlineDpoConfig, attempt: int = 0
) -> list[Candidate]:
    """K candidates per prompt from the policy as it was when the round began, the last of them from the reference."""
    decoding, version = training_decoding(config.sampling), log.index - 1
    with (
        log.stage(f"sample{numbered(attempt)}", len(prompts), "prompts") as stage,
        log.sampled(stage, prompts, policy_versions(decoding, version), attempt) as answers,
    ):
        team.generators.sample(
            answers.missing,
            decoding,
            seed=attempt_seed(config.run.seed, attempt),
            round_index=log.index,
            version=version,
            advance=stage.advance,
            on_finished=answers.add,
        )
    return answers.candidates


def score(
    log: RoundLog,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    team: Team,
    config: OnlineDpoConfig,
    attempt: int = 0,
    known: Mapping[Place, Score] = NOTHING_KNOWN,
) -> list[Score]:
    """What the scorer says of every candidate that is not `known`; too many that it cannot judge stop the round.

    One that asks people ends the run as waiting until they have answered.
    """
    asked = [candidate for candidate in candidates if place(candidate) not in known]
    with log.stage(f"score{numbered(attempt)}", len(asked), "candidates") as stage:
        if stage.done:
            return log.read_scores(candidates, attempt)
        found = team.scorer.score(with_answers(config, log.index, prompts, candidates), asked, stage.advance)
        scores = filled_in(candidates, known, found)
        log.save_candidates(stage, prompts, candidates, scores, attempt)
        log.save_scoring(stage, team.scorer.metrics(), attempt)
        check_unscored(found, config.scoring.max_unscored)
    return scores


def sample_again(
    log: RoundLog,
    prompts: Sequence[Prompt],
    candidates: list[Candidate],
    scores: list[Score],
    team: Team,
    config: OnlineDpoConfig,
) -> tuple[list[Candidate], list[Score]]:
    """More candidates for prompts without a pair, at most `max_resamples` times, beside those they have.

    A scorer that compares candidates looks at all of them anew: its earlier scores were among fewer.
    """
    for attempt in range(1, config.sampling.max_resamples + 1):
        again = without_pair(
            prompts, build_preferences(prompts, candidates, scores, config.pairing, config.run.seed + log.index)
        )
        if not again:
            break
        more = sample(log, again, team, config, attempt)
        group = joined(again, candidates, more)
        known = NOTHING_KNOWN if config.scoring.compares else scores_by_place(candidates, scores)
        found = score(log, again, group, team, config, attempt, known)
        candidates, scores = regrouped((candidates, scores), (group, found))
    return candidates, scores


def prefer(
    log: RoundLog,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    scores: Sequence[Score],
    config: OnlineDpoConfig,
) -> PairingResult:
    """Pairs from the scores: a pure function of candidates.parquet, so that it leaves no file of its own."""
    with log.stage("prefer", len(prompts), "prompts", again=True):
        pairing = build_preferences(prompts, candidates, scores, config.pairing, config.run.seed + log.index)
        require_preferences(pairing, log.index)
        if not config.loss.needs_kl_sample:
            return pairing
        count, seed = config.sampling.num_generations, config.run.seed + log.index
        preferences = with_policy_samples(pairing.preferences, prompts, candidates, count, seed)
    return replace(pairing, preferences=preferences)


def reference(
    log: RoundLog,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    pairing: PairingResult,
    team: Team,
    config: OnlineDpoConfig,
) -> tuple[Preference, ...]:
    """Reference log-probs, once for all epochs."""
    with log.stage("reference", len(pairing.preferences), "preferences") as stage:
        if stage.done:
            return log.read_preferences(prompts, candidates)
        preferences = team.trainers.with_reference(pairing.preferences, config.run.seed + log.index, log.index - 1)
        log.save_preferences(stage, preferences)
    return preferences


def publish(log: RoundLog, team: Team) -> Mapping[str, float]:
    """The new weights into every generator, proven by the canary."""
    with log.stage("publish", len(team.generators.handles), "generators", again=True):
        return team.publisher.publish(log.index)


def evaluate_policy(
    log: RoundLog, held_out: Sequence[Prompt], team: Team, config: OnlineDpoConfig
) -> tuple[AnyEvaluation, list[Sample]]:
    """Held-out scores, KL and shape of the policy version that the generators serve, with its completions."""
    decoding = evaluation_decoding(config.sampling, config.evaluation)
    by_id = {prompt.id: prompt for prompt in held_out}
    with log.stage("evaluate", len(held_out), "prompts") as stage:
        if stage.done:
            (candidates, scores), evaluation = log.read_held_out(), log.read_evaluation()
        else:
            # round_index=0: every version answers the held-out prompts with the same seeds.
            candidates = team.generators.sample(
                held_out, decoding, seed=config.run.seed, round_index=0, version=log.index, advance=stage.advance
            )
            scores, gold = team.scorer.score(held_out, candidates), team.scorer.gold(held_out, candidates)
            rows = [Completions(by_id[c.prompt_id].token_ids, (c.token_ids,)) for c in candidates]
            logprobs = [row[0] for row in team.trainers.reference_logprobs(rows)]
            same = bool(logprobs) and is_initial_reference(config.reference, max(0, log.index - 1))
            initial = logprobs if same else [row[0] for row in team.trainers.initial_logprobs(rows)]
            log.save_held_out(stage, held_out, candidates, with_gold(scores, gold))
            block, seed = config.evaluation, config.run.seed
            rates, logps = win_rates(log, candidates, scores, block), [math.fsum(own) for own in logprobs]
            evaluation = evaluate(held_out, candidates, scores, logps, block, seed, initial, gold, rates)
            log.save_evaluation(stage, evaluation)
    first = range(0, len(candidates), decoding.num_generations)[: config.evaluation.samples]
    return evaluation, [Sample(by_id[candidates[i].prompt_id], candidates[i].text, scores[i]) for i in first]


def win_rates(
    log: RoundLog, candidates: Sequence[Candidate], scores: Sequence[Score], block: EvaluationBlock
) -> VersionRates:
    """This version against earlier ones by the scores of their completions, prompt by prompt."""
    if not log.index:
        return {}
    versions = {name: log.read_held_out_of(0 if name == "initial" else log.index - 1) for name in block.win_rate}
    return against_versions(candidates, scores, versions, block.confidence)


def draw_prompts(
    run: Run, history: History, prompts: Sequence[Prompt], index: int, config: OnlineDpoConfig
) -> tuple[Prompt, ...]:
    """The prompts of round `index`; with a curriculum, of those that may still teach something."""
    count, curriculum = config.schedule.prompts_per_round, config.schedule.curriculum
    if curriculum is None:
        return draw(prompts, index, count, config.run.seed)
    drawn = draw_open(prompts, history.before(index), count, curriculum, config.run.seed)
    run.say(f"round {index}: left out are {drawn.right} prompts that are always right, {drawn.wrong} always wrong")
    return drawn.prompts


def train(run: Run, prompts: PromptSet, team: Team, config: OnlineDpoConfig) -> None:
    """Evaluate, then sample, score, prefer, train, publish and evaluate for every round that is not finished."""
    log = run.round_log(0)
    baseline, before = evaluate_policy(log, prompts.held_out, team, config)
    run.finish_baseline(with_capability(run, log, baseline, team.trainers, config), before)
    history = History(run.directory)
    for index in run.rounds_to_do():
        batch = draw_prompts(run, history, prompts.train, index, config)
        log = run.round_log(index)
        report, after = run_round(
            log, batch, prompts.held_out, team, guarded(config, config.loss, run.directory.decisions_before(index))
        )
        run.finish_round(report_with_capability(run, log, report, team.trainers, config), after)


def main(config: OnlineDpoConfig) -> Path:
    """Run the recipe, or go on with it where an earlier call was stopped; returns the run directory."""
    if done := finished_before(config):
        return done.path
    require_answers(config)
    with online_run(config, __file__) as (run, prompts, team):
        train(run, prompts, team, config)
    return run.directory.path


def method(config: OnlineDpoConfig) -> Method:
    """How a model card tells of it."""
    facts = {"Prompts": public_name(config.prompts.source), "Scorer": public_scorer(config.scoring)}
    each_round = "in each round the current policy answers prompts, a scorer judges the answers, and"
    if config.loss.needs_groups:
        told = f"iterative online\npolicy optimisation: {each_round} each\nanswer is weighed by its score in its group"
        return Method(told, f"online policy optimisation, loss {loss_name(config.loss)}", ("grpo",), facts)
    told = f"iterative online\ndirect preference optimisation: {each_round} the\n{config.pairing.told}"
    return Method(told, f"iterative online DPO, loss {loss_name(config.loss)}", ("dpo", "online-dpo"), facts)


RECIPE = Recipe(OnlineDpoConfig, main, show_plan, method)

if __name__ == "__main__":
    with as_script():
        main(load_config(Path(sys.argv[1]), sys.argv[2:]))
