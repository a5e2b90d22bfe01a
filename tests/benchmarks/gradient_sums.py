"""What adding gradients up in fp32 costs at ZeRO 0, beside bf16: seconds a step, memory, and what bf16 loses."""

from statistics import median
from typing import Annotated

import typer

from raylign.report.tables import report_console
from tests.benchmarks.contestants.gradient_sums_step import SumsJob, SumsResult
from tests.benchmarks.harness.children import Outcome, Stage, measured
from tests.benchmarks.harness.report import Check, cores, finish, machine, plain, results_folder, table

SUMS = ("bfloat16", "float32")
MOST_TIME, MOST_MEMORY = 1.1, 1.15


def main(
    layers: Annotated[int, typer.Option(min=1, help="Of SmolLM2-135M's shape, which has 30.")] = 30,
    tokens: Annotated[int, typer.Option(min=1, help="Of a backward pass.")] = 256,
    passes: Annotated[int, typer.Option(min=1, help="Backward passes of a step.")] = 8,
    steps: Annotated[int, typer.Option(min=2, help="The first is not counted.")] = 4,
) -> None:
    """Both train all weights of one random model in bf16 with fp32 masters; only the sums differ."""
    folder = results_folder("gradient_sums")
    stage = Stage(report_console(), folder, cores())
    facts = machine(stage)
    with measured("gradient_sums"):
        outcomes = {
            sums: stage.run(
                sums,
                "gradient_sums_step",
                SumsJob(sums=sums, layers=layers, tokens=tokens, passes=passes, steps=steps, threads=stage.threads),
                SumsResult,
            )
            for sums in SUMS
        }
    exact, rounded = outcomes["float32"], outcomes["bfloat16"]
    rows = [[name, f"{_step_s(of):.2f}", f"{of.memory.tree / 2**30:.2f}"] for name, of in outcomes.items()]
    checks = [
        Check("seconds of a step, times those with bf16 sums", _step_s(exact) / _step_s(rounded), "at most", MOST_TIME),
        Check(
            "peak memory, times that with bf16 sums", exact.memory.tree / rounded.memory.tree, "at most", MOST_MEMORY
        ),
        Check("what the sum of 64 gradients in bf16 is off by, relative", rounded.result.off, "at least", 0.0),
    ]
    finish(
        stage.console,
        folder,
        [table(f"{passes} passes a step", ["sums", "step, s", "peak, GiB"], rows)],
        checks,
        {
            "machine": facts,
            "contestants": plain(outcomes),
        },
    )


def _step_s(outcome: Outcome[SumsResult]) -> float:
    return median(outcome.result.step_s)


if __name__ == "__main__":
    typer.run(main)
