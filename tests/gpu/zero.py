"""Every ZeRO stage in every dtype, in full, LoRA, NF4, with checkpointing and with the optimizer in main memory.

The first step's loss is ln 2, because the policy is the reference; the second step's is lower on the same pairs; and
what is saved after it goes on from there as the trainer itself did.
"""

import math
import shutil
from collections.abc import Iterator, Sequence

import torch

from actors.trainer.rank import DeepSpeedRank
from raylign.records import Preference
from raylign.run.checkpoints import Metrics
from tests.gpu.ranks import spec_of, start_rank, with_reference
from tests.gpu.stage import Stage, preference, random_ids, tiny_folder
from tests.gpu.zero_cases import ALL, MODELS, TINY, TRAINERS, Case

_LN2 = math.log(2)
_OFF = {"float32": 1e-4, "bfloat16": 0.01, "float16": 0.01}
"""Of the first loss: two passes of one model may take different kernels, with gradients and without."""
_APART = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02}
"""Nats of a token's log-prob after one more step from what was saved; additions on a GPU come in any order."""
_SEED = 3
_EPOCHS = 16
"""Steps of the round, at most: float16 begins by skipping some, until its loss scale fits."""
_CASE_S = 6.0


def check(stage: Stage) -> None:
    pairs = _pairs(8)
    if stage.tiny:
        stage.sheet.skip("float16", "CPUs are not asked for it")
    for case in TINY if stage.tiny else ALL:
        if stage.sheet.has_time(str(case), 0 if stage.tiny else _CASE_S):
            with stage.sheet.trying(str(case)):
                _check_case(stage, case, pairs)


def _pairs(count: int) -> list[Preference]:
    generator = torch.Generator().manual_seed(5)
    lengths = [(5 + n % 3, 3 + n % 4, 4 + n % 5) for n in range(count)]
    drawn = [[random_ids(generator, length, 512) for length in of_pair] for of_pair in lengths]
    return [preference(n, prompt, completions) for n, (prompt, *completions) in enumerate(drawn)]


def _check_case(stage: Stage, case: Case, pairs: Sequence[Preference]) -> None:
    model = {"dtype": case.dtype, **MODELS[case.way]}
    # An adapter's second matrix starts at zero, and moves by about the rate.
    rate = 1e-2 if "lora" in model else 1e-3
    rates = {"zero_stage": case.stage, "learning_rate": rate, "num_train_epochs": _EPOCHS}
    trainer = {**rates, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **TRAINERS[case.way]}
    rank = start_rank(spec_of(stage, tiny_folder(stage), model, trainer))
    losses, apart = _losses_and_resumed(stage, rank, pairs)
    off, fell = abs(losses[0] - _LN2), losses[0] - losses[1]
    shares = (off / _OFF[case.dtype], apart / _APART[case.dtype], 0.0 if fell > 0 else math.inf)
    told = f"first loss {off:.2g} from ln 2, second {fell:.2g} lower, resumed {apart:.2g} nats apart"
    stage.sheet.require(str(case), max(shares), "at most", 1, "of its limits", f"{told}; {rank.layout()} rows")


def _losses_and_resumed(stage: Stage, rank: DeepSpeedRank, pairs: Sequence[Preference]) -> tuple[list[float], float]:
    """Losses of the first two steps that count, and how far a third one from a checkpoint leads elsewhere."""
    folder = stage.folder / "state"
    filled = with_reference(rank, pairs, _SEED)
    rank.begin_round(filled, _SEED, 0, ())
    steps = _taken(rank)
    losses = [float(next(steps)["loss"]) for _ in range(2)]
    reports = rank.save_state(str(folder), 1)
    rows = [[*pair.prompt.token_ids, *pair.candidates[0].token_ids] for pair in pairs]
    next(steps)
    went_on = rank.token_logps(rows)
    rank.load_state(str(folder))
    rank.begin_round(filled, _SEED, 0, reports)
    next(_taken(rank))
    resumed = rank.token_logps(rows)
    shutil.rmtree(folder)
    flat = [torch.tensor([value for row in found for value in row]) for found in (went_on, resumed)]
    return losses, float((flat[0] - flat[1]).abs().max())


def _taken(rank: DeepSpeedRank) -> Iterator[Metrics]:
    """The round's steps, without those that float16 skips."""
    while True:
        report = rank.train_step()
        if not report.get("skipped_steps"):
            yield report
