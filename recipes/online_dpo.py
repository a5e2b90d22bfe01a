"""Online DPO (Rafailov et al. 2023, on the policy's own samples): the whole loop on one screen.

Run it with `raylign run recipes/sentiment_smollm2.yaml`, or copy this file and edit the round. Every stage leaves a
file before the next one starts; run again, it goes on at the first stage that is not finished.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from actors.team import Team
from raylign.config import RunConfig, load_config
from raylign.evaluation import evaluate
from raylign.pairing import PairingResult, build_preferences, require_preferences
from raylign.prompts import PromptSet, draw
from raylign.records import Candidate, Evaluation, Preference, Prompt, RoundReport, Score
from raylign.reporting import Sample
from raylign.rounds import RoundLog
from raylign.sampling import evaluation_decoding, training_decoding
from raylign.scoring import check_unscored
from raylign.training.schedule import steps_per_round
from raylign.training.sequences import Completions
from recipes.campaign import Campaign, campaign, finished_before


def run_round(
    log: RoundLog, prompts: Sequence[Prompt], held_out: Sequence[Prompt], team: Team, config: RunConfig
) -> tuple[RoundReport, list[Sample]]:
    """Round `index` trains policy version `index` from samples of version `index - 1`."""
    candidates = sample(log, prompts, team, config)
    scores = score(log, prompts, candidates, team, config)
    pairing = prefer(log, prompts, candidates, scores, config)
    preferences = reference(log, prompts, candidates, pairing, team, config)
    steps = train_policy(log, preferences, team, config)
    sync = publish(log, team)
    evaluation, samples = evaluate_policy(log, held_out, team, config)
    counts, scoring = pairing.counts, log.read_scoring()
    return RoundReport(log.index, log.index, counts, tuple(steps), sync, evaluation, log.seconds, scoring), samples


def sample(log: RoundLog, prompts: Sequence[Prompt], team: Team, config: RunConfig) -> list[Candidate]:
    """K candidates per prompt from the policy as it was when the round began."""
    decoding, version = training_decoding(config.sampling), log.index - 1
    with (
        log.stage("sample", len(prompts), "prompts") as stage,
        log.sampled(stage, prompts, decoding.num_generations, version) as sheet,
    ):
        team.generators.sample(
            sheet.missing,
            decoding,
            seed=config.run.seed,
            round_index=log.index,
            version=version,
            advance=stage.advance,
            on_finished=sheet.add,
        )
    return sheet.candidates


def score(
    log: RoundLog, prompts: Sequence[Prompt], candidates: Sequence[Candidate], team: Team, config: RunConfig
) -> list[Score]:
    """What the scorer says of every candidate; too many that it cannot judge stop the round."""
    with log.stage("score", len(candidates), "candidates") as stage:
        if stage.done:
            return log.read_scores()
        scores = team.scorer.score(prompts, candidates, stage.advance)
        log.save_candidates(stage, prompts, candidates, scores)
        log.save_scoring(stage, team.scorer.metrics())
        check_unscored(scores, config.scoring.max_unscored)
    return scores


def prefer(
    log: RoundLog,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    scores: Sequence[Score],
    config: RunConfig,
) -> PairingResult:
    """Pairs from the scores: a pure function of candidates.parquet, so that it leaves no file of its own."""
    with log.stage("prefer", len(prompts), "prompts", again=True):
        pairing = build_preferences(prompts, candidates, scores, config.pairing)
        require_preferences(pairing, log.index)
    return pairing


def reference(
    log: RoundLog,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    pairing: PairingResult,
    team: Team,
    config: RunConfig,
) -> tuple[Preference, ...]:
    """Reference log-probs, once for all epochs."""
    with log.stage("reference", len(pairing.preferences), "preferences") as stage:
        if stage.done:
            return log.read_preferences(prompts, candidates)
        preferences = team.trainers.with_reference(pairing.preferences, config.run.seed + log.index, log.index - 1)
        log.save_preferences(stage, preferences)
    return preferences


def train_policy(
    log: RoundLog, preferences: Sequence[Preference], team: Team, config: RunConfig
) -> list[Mapping[str, float]]:
    """Every optimizer step of the round, then its checkpoint."""
    with log.stage("train", steps_per_round(len(preferences), config.trainer), "steps") as stage:
        if stage.done:
            return list(log.trained.steps)
        return team.trainers.train_round(preferences, config.run.seed + log.index, log, stage.advance)


def publish(log: RoundLog, team: Team) -> Mapping[str, float]:
    """The new weights into every generator, proven by the canary."""
    with log.stage("publish", len(team.generators.handles), "generators", again=True):
        return team.publisher.publish(log.index)


def evaluate_policy(
    log: RoundLog, held_out: Sequence[Prompt], team: Team, config: RunConfig
) -> tuple[Evaluation, list[Sample]]:
    """Held-out score, KL and shape of the policy version that the generators serve, with its completions."""
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
            scores = team.scorer.score(held_out, candidates)
            rows = [Completions(by_id[c.prompt_id].token_ids, (c.token_ids,)) for c in candidates]
            logps = [row[0] for row in team.trainers.reference_logps(rows)]
            log.save_held_out(stage, held_out, candidates, scores)
            evaluation = evaluate(held_out, candidates, scores, logps, config.evaluation, config.run.seed)
            log.save_evaluation(stage, evaluation)
    first = range(0, len(candidates), decoding.num_generations)
    return evaluation, [Sample(by_id[candidates[i].prompt_id], candidates[i].text, scores[i]) for i in first]


def train(run: Campaign, prompts: PromptSet, team: Team, config: RunConfig) -> None:
    """Evaluate, then sample, score, prefer, train, publish and evaluate for every round that is not finished."""
    baseline, before = evaluate_policy(run.round_log(0), prompts.held_out, team, config)
    run.finish_baseline(baseline, before)
    for index in run.rounds_to_do():
        batch = draw(prompts.train, index, config.schedule.prompts_per_round, config.run.seed)
        report, after = run_round(run.round_log(index), batch, prompts.held_out, team, config)
        run.finish_round(report, after)


def main(config: RunConfig) -> Path:
    """Run the recipe, or go on with it where an earlier call was stopped; returns the run directory."""
    if done := finished_before(config):
        return done[0].path
    with campaign(config) as (run, prompts, team):
        train(run, prompts, team, config)
    return run.directory.path


if __name__ == "__main__":
    main(load_config(Path(sys.argv[1]), sys.argv[2:]))
