"""Online DPO (Rafailov et al. 2023, on the policy's own samples): the whole loop on one screen.

Run it with `raylign run recipes/sentiment_smollm2.yaml`, or copy this file and edit the round.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from actors.team import Team
from raylign.config import RunConfig, load_config
from raylign.evaluation import evaluate
from raylign.pairing import build_preferences, require_preferences
from raylign.prompts import PromptSet, draw
from raylign.records import Evaluation, Prompt, RoundReport
from raylign.reporting import Sample
from raylign.rounds import NOT_YET_SCORED, RoundLog
from raylign.sampling import evaluation_decoding, training_decoding
from raylign.scoring import check_unscored
from raylign.training.schedule import steps_per_round
from raylign.training.sequences import Completions
from recipes.campaign import Campaign, campaign


def run_round(
    log: RoundLog, prompts: Sequence[Prompt], held_out: Sequence[Prompt], team: Team, config: RunConfig
) -> tuple[RoundReport, list[Sample]]:
    """Round `index` trains policy version `index` from samples of version `index - 1`."""
    index, seed = log.index, config.run.seed
    with log.stage("sample", len(prompts), "prompts") as advance:
        candidates = team.generators.sample(
            prompts,
            training_decoding(config.sampling),
            seed=seed,
            round_index=index,
            version=index - 1,
            advance=advance,
        )
        log.save_candidates(prompts, candidates, [NOT_YET_SCORED] * len(candidates))
    with log.stage("score", len(candidates), "candidates"):
        scores = team.scorer.score(prompts, candidates)
        log.save_candidates(prompts, candidates, scores)
        check_unscored(scores, config.scoring.max_unscored)
    with log.stage("prefer", len(prompts), "prompts"):
        pairing = build_preferences(prompts, candidates, scores, config.pairing)
        require_preferences(pairing, index)
    with log.stage("reference", len(pairing.preferences), "preferences"):
        preferences = team.trainers.with_reference(pairing.preferences, seed + index, index - 1)
        log.save_preferences(preferences)
    steps: list[dict[str, float]] = []
    with log.stage("train", steps_per_round(len(preferences), config.trainer), "steps") as advance:
        for metrics in team.trainers.train(preferences, seed + index):
            steps.append(metrics)
            log.step(len(steps), metrics)
            advance(1)
    with log.stage("publish", len(team.generators.handles), "generators"):
        sync = team.publisher.publish(index)
    evaluation, samples = evaluate_policy(log, held_out, team, config)
    report = RoundReport(index, index, pairing.counts, tuple(steps), sync, evaluation, log.seconds)
    return report, samples


def evaluate_policy(
    log: RoundLog, held_out: Sequence[Prompt], team: Team, config: RunConfig
) -> tuple[Evaluation, list[Sample]]:
    """Held-out score, KL and shape of the policy version that the generators serve, with its completions."""
    decoding = evaluation_decoding(config.sampling, config.evaluation)
    with log.stage("evaluate", len(held_out), "prompts") as advance:
        # round_index=0: every version answers the held-out prompts with the same seeds.
        candidates = team.generators.sample(
            held_out, decoding, seed=config.run.seed, round_index=0, version=log.index, advance=advance
        )
        scores = team.scorer.score(held_out, candidates)
        by_id = {prompt.id: prompt for prompt in held_out}
        rows = [Completions(by_id[c.prompt_id].token_ids, (c.token_ids,)) for c in candidates]
        logps = [row[0] for row in team.trainers.reference_logps(rows)]
        log.save_held_out(held_out, candidates, scores)
    evaluation = evaluate(held_out, candidates, scores, logps, config.evaluation, config.run.seed)
    first = range(0, len(candidates), decoding.num_generations)
    return evaluation, [Sample(by_id[candidates[i].prompt_id], candidates[i].text, scores[i]) for i in first]


def train(run: Campaign, prompts: PromptSet, team: Team, config: RunConfig) -> None:
    """Evaluate, then sample, score, prefer, train, publish and evaluate for every round."""
    baseline, before = evaluate_policy(run.round_log(0), prompts.held_out, team, config)
    run.finish_baseline(baseline, before)
    for index in range(1, config.schedule.rounds + 1):
        batch = draw(prompts.train, index, config.schedule.prompts_per_round, config.run.seed)
        report, after = run_round(run.round_log(index), batch, prompts.held_out, team, config)
        run.finish_round(report, after, team)


def main(config: RunConfig) -> Path:
    """Run the recipe; returns the run directory."""
    with campaign(config) as (run, prompts, team):
        train(run, prompts, team, config)
    return run.directory.path


if __name__ == "__main__":
    main(load_config(Path(sys.argv[1]), sys.argv[2:]))
