"""raylign's rounds: the recipe's own loop on a real team, until the count or the budget is reached.

A policy that has learnt the task gives candidates that all score alike, hence no pair: raylign then stops before its
time is up, and its last policy is the result.
"""

import shutil
import time
from collections import Counter
from pathlib import Path

from raylign.config import OnlineDpoConfig, load_config
from raylign.errors import NoPreferencesError
from raylign.prompts import draw
from raylign.report.tables import sampled
from recipes.online_dpo import evaluate_policy, run_round
from recipes.opening import online_run
from tests.benchmarks.harness.children import contestant, progress
from tests.benchmarks.harness.online import OnlineJob, OnlineResult, process_age_s

_ENDLESS = 100_000
"""Rounds that the schedule plans; its learning rate is constant, so that the number means nothing."""


def run(job: OnlineJob) -> OnlineResult:
    own = ("run.name=bench", f"run.dir={job.work}", f"schedule.rounds={_ENDLESS}")
    config = load_config(Path(job.recipe), (*job.settings, *own))
    durations: list[float] = []
    stages: Counter[str] = Counter()
    with online_run(config) as (record, prompts, team):
        start_s = process_age_s()
        progress(f"team ready in {start_s:.0f} s")
        record.finish_baseline(*evaluate_policy(record.round_log(0), prompts.held_out, team, config))
        while not job.stop.reached(durations):
            index = len(durations) + 1
            started = time.monotonic()
            batch = draw(prompts.train, index, config.schedule.prompts_per_round, config.run.seed)
            try:
                report, samples = run_round(record.round_log(index), batch, prompts.held_out, team, config)
            except NoPreferencesError:
                progress(f"round {index}: all candidates are alike by score; nothing is left to train on")
                break
            record.finish_round(report, samples)
            durations.append(time.monotonic() - started - report.seconds["evaluate"])
            stages.update(report.seconds)
            progress(f"round {index}: {durations[-1]:.1f} s, held-out score {sampled(report.evaluation).score:.3f}")
        shutil.copytree(record.directory.checkpoint(len(durations)), job.adapter)
    return OnlineResult(
        start_s=start_s,
        seconds=tuple(durations),
        prompts=config.schedule.prompts_per_round,
        stages=dict(stages),
        settings=_settings(config),
    )


def _settings(config: OnlineDpoConfig) -> dict[str, str | int | float | bool | None]:
    return {
        "num_generations": config.sampling.num_generations,
        "max_new_tokens": config.sampling.max_new_tokens,
        "temperature": config.sampling.temperature,
        "min_margin": config.pairing.min_margin,
        "beta": config.loss.beta if hasattr(config.loss, "beta") else None,
        "learning_rate": config.trainer.learning_rate,
        "preferences_a_step": config.trainer.train_batch_size,
    }


if __name__ == "__main__":
    contestant(run, OnlineJob)
