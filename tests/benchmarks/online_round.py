"""Online DPO end to end: TRL's OnlineDPOTrainer and raylign in turn on the same prompts with the same reward."""

import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from raylign.report.tables import report_console
from tests.benchmarks.harness.children import ROOT, Outcome, Stage, measured
from tests.benchmarks.harness.online import JudgeJob, JudgeResult, OnlineJob, OnlineResult, Stop
from tests.benchmarks.harness.report import Check, cores, finish, machine, plain, results_folder, table

RECIPE = ROOT / "recipes/sentiment_smollm2.yaml"
MIN_SPEED_UP = 3.0
WARM_UP = 1
CPU = ("placement.device=cpu", "model.dtype=bfloat16")
"""The base in the dtype that TRL's has here."""
SAME_WORK = (*CPU, "sampling.num_generations=2", "sampling.max_new_tokens=48", "pairing.min_margin=0")
"""What TRL does: two completions a prompt, and every prompt is trained on."""
GIB = 2**30

Outcomes = dict[str, Outcome[OnlineResult]]


def main(
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of raylign; the first is reported apart.")] = 3,
    trl_steps: Annotated[int, typer.Option(min=2, help="Steps of TRL; the first is reported apart.")] = 6,
    prompts_per_round: Annotated[int, typer.Option(help="Prompts a round of raylign.")] = 48,
    trl_batch: Annotated[int, typer.Option(help="Prompts a step of TRL, and preferences a step of raylign.")] = 8,
    wall_clock: Annotated[
        bool, typer.Option("--wall-clock", help="Compare held-out scores after equal training time instead.")
    ] = False,
    budget: Annotated[float, typer.Option(help="Seconds of training in --wall-clock.")] = 330.0,
    samples: Annotated[int, typer.Option(help="Completions a held-out prompt in --wall-clock.")] = 4,
    threads: Annotated[int, typer.Option(help="Compute threads of every contestant; 0: one a core.")] = 0,
) -> None:
    """Compare TRL's OnlineDPOTrainer and raylign: prompts a second, or held-out scores after equal time."""
    name = "online_wall_clock" if wall_clock else "online_round"
    folder = results_folder(name)
    stage = Stage(report_console(), folder, threads or cores())
    facts = machine(stage)
    actors = math.gcd(stage.threads, trl_batch)
    shape = (
        f"placement.generator_cpus={stage.threads // actors}",
        f"placement.trainer_cpus={stage.threads // actors}",
        f"generators.count={actors}",
        f"trainer.ranks={actors}",
        f"trainer.per_device_train_batch_size={trl_batch // actors}",
    )
    with tempfile.TemporaryDirectory(prefix="bench-online-") as scratch, measured(name):
        contest = _Contest(stage, Path(scratch), trl_batch)
        if wall_clock:
            outcomes = contest.run((*CPU, *shape), Stop(budget_s=budget), Stop(budget_s=budget))
            evaluations = contest.judge((*CPU, *shape), samples)
            tables, checks = [_score_table(outcomes, evaluations)], [_score_check(evaluations)]
        else:
            settings = (*SAME_WORK, *shape, f"schedule.prompts_per_round={prompts_per_round}")
            outcomes = contest.run(settings, Stop(count=trl_steps), Stop(count=rounds))
            evaluations = {}
            tables, checks = [_speed_table(outcomes), _stage_table(outcomes["raylign"].result)], [_check(outcomes)]
    record = {"machine": facts, "contestants": plain(outcomes), "evaluations": evaluations}
    finish(stage.console, folder, tables, checks, record)


class _Contest:
    """Runs both on the recipe and keeps their adapters in `scratch`."""

    def __init__(self, stage: Stage, scratch: Path, trl_batch: int) -> None:
        self._stage, self._scratch, self._trl_batch = stage, scratch, trl_batch

    def run(self, settings: tuple[str, ...], trl: Stop, ours: Stop) -> Outcomes:
        return {
            "TRL": self._stage.run("TRL", "online_trl", self._job("TRL", settings, trl), OnlineResult),
            "raylign": self._stage.run("raylign", "online_raylign", self._job("raylign", settings, ours), OnlineResult),
        }

    def _job(self, name: str, settings: tuple[str, ...], stop: Stop) -> OnlineJob:
        return OnlineJob(
            recipe=str(RECIPE),
            settings=settings,
            stop=stop,
            trl_batch=self._trl_batch,
            adapter=str(self._adapter(name)),
            work=str(self._scratch / f"work-{name}"),
            threads=self._stage.threads,
        )

    def _adapter(self, name: str) -> Path:
        return self._scratch / f"adapter-{name}"

    def judge(self, settings: tuple[str, ...], samples: int) -> dict[str, dict[str, Any]]:
        """Evaluations of the model as it came and of both adapters, by one sampler."""
        adapters: dict[str, str | None] = {name: str(self._adapter(name)) for name in ("TRL", "raylign")}
        job = JudgeJob(
            recipe=str(RECIPE),
            settings=settings,
            adapters={"before": None} | adapters,
            samples=samples,
            threads=self._stage.threads,
        )
        return self._stage.run("judge", "online_judge", job, JudgeResult).result.evaluations


def _speed_table(outcomes: Outcomes) -> Table:
    rows = [
        [
            name,
            outcome.result.start_s,
            outcome.result.prompts / outcome.result.seconds[0],
            outcome.result.prompts_a_second(WARM_UP),
            outcome.memory.tree / GIB,
        ]
        for name, outcome in outcomes.items()
    ]
    headers = ["contestant", "start-up\ns", "first round\nprompts/s", "steady\nprompts/s", "peak memory\nGiB"]
    return table("sample, score, reference, train, publish", headers, rows)


def _stage_table(result: OnlineResult) -> Table:
    rounds = len(result.seconds)
    rows = [[name, seconds / rounds] for name, seconds in result.stages.items()]
    return table(f"raylign, {result.prompts} prompts a round", ["stage", "s a round"], rows)


def _check(outcomes: Outcomes) -> Check:
    ratio = outcomes["raylign"].result.prompts_a_second(WARM_UP) / outcomes["TRL"].result.prompts_a_second(WARM_UP)
    return Check("prompts/s, times TRL's", ratio, "at least", MIN_SPEED_UP)


def _score_table(outcomes: Outcomes, evaluations: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for name, found in evaluations.items():
        result = outcomes[name].result if name in outcomes else None
        trained = [sum(result.seconds), result.prompts * len(result.seconds)] if result else ["-", "-"]
        interval = f"[{found['score_low']:.3f}, {found['score_high']:.3f}]"
        rows.append([name, *trained, found["score"], interval, found["distinct_2"], found["length"]])
    headers = ["policy", "training\ns", "prompts", "held-out\nscore", "interval", "distinct-2", "length\ntokens"]
    return table("held-out VADER score after equal training time", headers, rows)


def _score_check(evaluations: dict[str, dict[str, Any]]) -> Check:
    ahead = evaluations["raylign"]["score"] - evaluations["TRL"]["score"]
    return Check("held-out score after equal training time, above TRL's", ahead, "at least", 0.0)


if __name__ == "__main__":
    typer.run(main)
