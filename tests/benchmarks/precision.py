"""What bf16 costs: raylign in bf16 and fp32, and TRL, on the same pairs in the same order; judged on held-out pairs."""

import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from raylign.models import load_tokenizer, resolve_model
from raylign.report.tables import report_console
from raylign.run.files import publish_text
from tests.benchmarks.harness.children import Stage, measured
from tests.benchmarks.harness.dpo import DpoJob, DpoResult, in_planned_order
from tests.benchmarks.harness.pairs import TokenPair, read_pairs
from tests.benchmarks.harness.precision import (
    LogpsJob,
    LogpsResult,
    Values,
    dpo_margins,
    interval,
    losses_of,
    mean_over_seeds,
    right_of,
    share_of,
    shown,
)
from tests.benchmarks.harness.report import Check, cores, finish, machine, results_folder, table
from tests.benchmarks.harness.sampled import MODEL, sampled_pairs

CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "raylign fp32": ("dpo_raylign", {"dtype": "float32"}),
    "raylign bf16": ("dpo_raylign", {"dtype": "bfloat16"}),
    "TRL": ("dpo_trl", {"dtype": "bfloat16", "trl_dtype": "float32"}),
}
MIN_SHARE = 0.9
"""Of what fp32 moves held-out margins by, in the same direction: a loss that has hardly moved yet tells little."""
EXACT, NARROW = "raylign fp32", "raylign bf16"


class Trained(DpoResult):
    """A contestant's curves, and what the judge found of what it saved."""

    held_out: LogpsResult


Found = dict[str, dict[int, Trained]]


def main(
    data: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Pairs in LLaMA-Factory's format; else sampled.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of the one epoch.")] = 256,
    held_out: Annotated[int, typer.Option(help="Pairs to judge by.")] = 96,
    new_tokens: Annotated[int, typer.Option(help="Of a sampled completion, at most.")] = 12,
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence, at most.")] = 512,
    seeds: Annotated[int, typer.Option(min=1, help="Orders of the pairs.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Pairs a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Constant, for all.")] = 5e-6,
    only: Annotated[list[str] | None, typer.Option(help=f"Contestants: {', '.join(CONTESTANTS)}.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Go on where an earlier run in this folder stopped.")] = None,
    threads: Annotated[int, typer.Option(help="Compute threads of every contestant; 0: one a core.")] = 0,
) -> None:
    """Full fine-tuning for one epoch; the paired difference of held-out losses, bf16 less fp32, must include 0."""
    folder = folder or results_folder("precision")
    stage = Stage(report_console(), folder, threads or cores())
    facts, model = machine(stage), resolve_model(MODEL)
    source = data or sampled_pairs(pairs + held_out, new_tokens, stage.say)
    tokenizer = load_tokenizer(model)
    read = read_pairs(source, tokenizer, pairs + held_out, max_length)
    job = DpoJob(
        folder=model,
        tokenizer=model,
        pad_id=int(tokenizer.pad_token_id),
        warm_up=(),
        steady=tuple(read[:pairs]),
        batch=batch,
        micro_batch=batch,
        learning_rate=learning_rate,
        beta=0.1,
        threads=stage.threads,
        wide_products=True,
    )
    experiment = _Experiment(stage, folder, job, tuple(read[pairs:]))
    with measured("precision"):
        reference = experiment.judged("initial policy", model)
        found: Found = {name: {} for name in only or CONTESTANTS}
        for seed in range(seeds):
            for name in found:
                found[name][seed] = experiment.trained(name, seed)
    margins = {
        name: [dpo_margins(one.held_out, reference, job.beta) for one in of.values()] for name, of in found.items()
    }
    tables = [_table(margins), _seed_table(margins), _difference_table(margins)]
    record = {"machine": facts, "job": job.model_dump(exclude={"warm_up", "steady"}) | {"pairs": pairs}}
    record |= {"contestants": {n: {s: one.model_dump() for s, one in of.items()} for n, of in found.items()}}
    finish(stage.console, folder, tables, _checks(margins), record | {"reference": reference.model_dump()})


class _Experiment:
    """Trains and judges; what is done lies in `folder`, one file each."""

    def __init__(self, stage: Stage, folder: Path, job: DpoJob, held_out: tuple[TokenPair, ...]) -> None:
        self._stage, self._folder, self._job, self._held_out = stage, folder, job, held_out

    def judged(self, name: str, model: str) -> LogpsResult:
        path = self._folder / f"{name.replace(' ', '-')}.json"
        if not path.exists():
            job = LogpsJob(folder=model, pairs=self._held_out, threads=self._job.threads)
            found = self._stage.run(f"judge {name}", "judge_logps", job, LogpsResult).result
            publish_text(path, found.model_dump_json())
        return LogpsResult.model_validate_json(path.read_bytes())

    def trained(self, name: str, seed: int) -> Trained:
        path = self._folder / f"{name.replace(' ', '-')}-seed-{seed}.json"
        if not path.exists():
            module, settings = CONTESTANTS[name]
            with tempfile.TemporaryDirectory(prefix="bench-precision-") as scratch:
                job = self._ordered(seed).model_copy(update=settings | {"saved": str(Path(scratch, "saved"))})
                asked = in_planned_order(job) if module == "dpo_trl" else job
                curves = self._stage.run(f"{name} seed {seed}", module, asked, DpoResult).result
                held_out = self.judged(f"{name} seed {seed} held out", str(Path(scratch, "saved")))
            publish_text(path, Trained(**curves.model_dump(), held_out=held_out).model_dump_json())
        return Trained.model_validate_json(path.read_bytes())

    def _ordered(self, seed: int) -> DpoJob:
        pairs = random.Random(seed).sample(self._job.steady, len(self._job.steady))
        return self._job.model_copy(
            update={"warm_up": tuple(pairs[: self._job.batch]), "steady": tuple(pairs[self._job.batch :])}
        )


Margins = Mapping[str, Sequence[Values]]


def _table(margins: Margins) -> Table:
    rows = []
    for name, seeds in margins.items():
        parts = (mean_over_seeds([of(one) for one in seeds]) for of in (right_of, losses_of, lambda values: values))
        rows.append([name, *map(shown, parts)])
    headers = ["contestant", "accuracy", "loss", "rewards/margins"]
    return table("held-out pairs, mean over seeds [95 % over pairs]", headers, rows)


def _seed_table(margins: Margins) -> Table:
    rows = [[name, *[float(losses_of(one).mean()) for one in seeds]] for name, seeds in margins.items()]
    count = max(len(seeds) for seeds in margins.values())
    return table("held-out loss of each seed", ["contestant", *[f"seed {seed}" for seed in range(count)]], rows)


def _difference_table(margins: Margins) -> Table:
    rows = []
    for name in margins if EXACT in margins else ():
        share, low, high = share_of(np.array(margins[name]), np.array(margins[EXACT]))
        rows.append([name, shown(_difference(margins, name), 5), f"{share:.3f} [{low:.3f}, {high:.3f}]"])
    headers = ["contestant", "loss, less that of fp32\nnats", "margins, share of\nfp32's"]
    return table(f"beside {EXACT}, pair by pair [95 % over pairs]", headers, rows)


def _difference(margins: Margins, name: str) -> Values:
    """Of each pair's losses, averaged over seeds: `name` less EXACT."""
    difference: Values = mean_over_seeds([losses_of(one) for one in margins[name]]) - mean_over_seeds(
        [losses_of(one) for one in margins[EXACT]]
    )
    return difference


def _checks(margins: Margins) -> list[Check]:
    if not {EXACT, NARROW} <= margins.keys():
        return []
    low, high = interval(_difference(margins, NARROW))
    share = share_of(np.array(margins[NARROW]), np.array(margins[EXACT]))
    what = "held-out loss, bf16 less fp32, nats:"
    return [
        Check(f"{what} lower end of the interval", low, "at most", 0),
        Check(f"{what} upper end of the interval", high, "at least", 0),
        Check("share of fp32's held-out margins that bf16 has", float(share[0]), "at least", MIN_SHARE),
    ]


if __name__ == "__main__":
    typer.run(main)
