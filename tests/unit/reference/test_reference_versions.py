"""Whose samples are the reference's, the rules on who can give them, and how they are drawn and kept."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from raylign.config import OnlineDpoConfig, parse_config
from raylign.config.reference import (
    EmaReferenceBlock,
    EveryReferenceBlock,
    InitialReferenceBlock,
    ModelReferenceBlock,
    NoReferenceBlock,
    PreviousRoundReferenceBlock,
    ReferenceBlock,
    SamplerReferenceBlock,
)
from raylign.errors import ConfigError
from raylign.records import Candidate, Prompt
from raylign.reference.versions import is_initial_reference, is_new_reference, reference_version
from raylign.run.sampled import sampled_file
from raylign.sampling.decoding import Decoding, policy_versions, prompt_seed
from tests.fakes import FakeEngine, FakeGenerators

LORA = "model.lora.r=4"
ONE = "sampling.reference_generations=1"
XPO = "loss={loss_type: mix, losses: [{loss_type: sigmoid}, {loss_type: xpo}], loss_weights: [1, 1.0e-5]}"
XPO_LISTS = "loss={loss_type: mix, losses: [{loss_type: plackett_luce}, {loss_type: xpo}]}"
AGAINST = "pairing.type=policy_reference"
DECODING = Decoding(3, 8, 1.0, 1.0, 0, reference_generations=1)
PROMPT = Prompt("a", (), (1, 2, 3))


@pytest.mark.parametrize(
    ("block", "versions"),
    [
        (InitialReferenceBlock(), [0, 0, 0, 0, 0]),
        (PreviousRoundReferenceBlock(), [0, 1, 2, 3, 4]),
        (SamplerReferenceBlock(), [0, 1, 2, 3, 4]),
        (EveryReferenceBlock(n=2), [0, 0, 2, 2, 4]),
        (EmaReferenceBlock(), [None] * 5),
        (ModelReferenceBlock(path="other"), [None] * 5),
        (NoReferenceBlock(), [None] * 5),
    ],
    ids=lambda value: getattr(value, "policy", ""),
)
def test_the_version_that_is_the_reference(block: ReferenceBlock, versions: list[int | None]) -> None:
    assert [reference_version(block, rounds_done) for rounds_done in range(5)] == versions


@pytest.mark.parametrize(
    ("block", "new", "initial"),
    [
        (InitialReferenceBlock(), [0], [0, 1, 2, 3, 4]),
        (PreviousRoundReferenceBlock(), [0, 1, 2, 3, 4], [0]),
        (SamplerReferenceBlock(), [0, 1, 2, 3, 4], [0]),
        (EveryReferenceBlock(n=2), [0, 2, 4], [0, 1]),
        (EmaReferenceBlock(), [0, 1, 2, 3, 4], [0]),
        (ModelReferenceBlock(path="other"), [0], []),
        (NoReferenceBlock(), [0], []),
    ],
    ids=lambda value: getattr(value, "policy", ""),
)
def test_the_rounds_with_a_new_reference_and_with_the_initial_one(
    block: ReferenceBlock, new: list[int], initial: list[int]
) -> None:
    assert [rounds_done for rounds_done in range(5) if is_new_reference(block, rounds_done)] == new
    assert [rounds_done for rounds_done in range(5) if is_initial_reference(block, rounds_done)] == initial


def accepted(*overrides: str) -> OnlineDpoConfig:
    return parse_config({}, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.reference_generations=4"], "leaves the policy none of num_generations=4"),
        ([ONE], "set model.lora and model.load_in_4bit=false"),
        ([ONE, LORA, "model.load_in_4bit=true"], "set model.lora and model.load_in_4bit=false"),
        ([ONE, LORA, "generators.weight_sync.transport=shm"], "transport=shm merges the adapter.*use auto or lora"),
        ([ONE, LORA, "generators.weight_sync.transport=nccl"], "transport=nccl merges the adapter.*use auto or lora"),
        ([ONE, LORA, "reference.policy=ema"], "generators hold the policy and the initial model, not that reference"),
        ([ONE, LORA, "reference.policy=every"], "not that reference; set reference.policy=initial"),
        ([ONE, LORA, "reference={policy: model, path: x}"], "not that reference; set reference.policy=initial"),
        ([ONE, LORA, "reference.policy=previous_round"], "every candidate is a sample of that reference as it is"),
        ([ONE, LORA, "reference.policy=sampler"], "set sampling.reference_generations=0"),
        ([XPO, AGAINST, LORA], "set sampling.reference_generations=1 with reference.policy=initial"),
        ([AGAINST, LORA], "pairing.type=policy_reference needs samples of the reference"),
        (
            [XPO, "reference.policy=ema"],
            "xpo, a bonus in the loss, needs .*, and reference.policy=ema answers no prompt",
        ),
        ([XPO, LORA, ONE], "pairing.type=best_worst chooses by score.*set pairing.type=policy_reference, or ranking"),
        ([XPO_LISTS, LORA, ONE, "pairing={type: ranking, max_candidates: 3}"], "with max_candidates=null"),
        ([XPO, LORA, ONE, "pairing={type: policy_reference, weights: margin}"], "set pairing.weights=none"),
    ],
)
def test_a_reference_that_nobody_can_sample_is_refused(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        accepted(*overrides)


def test_references_that_can_be_sampled() -> None:
    for transport in ("auto", "lora"):
        accepted(ONE, LORA, XPO, AGAINST, f"generators.weight_sync.transport={transport}")
    accepted(ONE, LORA)
    accepted(ONE, LORA, AGAINST)
    accepted(ONE, LORA, XPO_LISTS, "pairing.type=ranking")
    accepted(ONE, LORA, "loss.loss_type=kto")
    for policy in ("sampler", "previous_round"):
        accepted(XPO, AGAINST, f"reference.policy={policy}")


def sampled(version: int, weights: int) -> list[Candidate]:
    engine = FakeEngine([])
    engine.weights, engine.label_now = weights, version
    return FakeGenerators([engine]).sample(
        [PROMPT], DECODING, seed=7, round_index=3, version=version, advance=lambda finished: None
    )


def test_the_reference_answers_last_with_its_own_version_log_probs_and_the_prompts_seeds() -> None:
    found = sampled(version=2, weights=2)
    assert [candidate.policy_version for candidate in found] == [2, 2, 0]
    assert [candidate.index for candidate in found] == [0, 1, 2]
    assert [candidate.seed for candidate in found] == [prompt_seed(7, 3, "a") + index for index in range(3)]
    assert {candidate.logprobs[0] for candidate in found[:2]} == {-1 / 3} and found[2].logprobs[0] == -1.0


def test_a_sheet_keeps_what_policy_and_reference_answered(tmp_path: Path) -> None:
    path, versions = tmp_path / "sampled.jsonl", policy_versions(DECODING, 2)
    found = sampled(version=2, weights=2)
    with sampled_file(path, [PROMPT], versions) as sheet:
        sheet.add(found)
    with sampled_file(path, [PROMPT], versions) as sheet:
        assert sheet.missing == [] and sheet.candidates == found


@pytest.mark.parametrize("versions", [(2, 2, 2), (2, 2), (2, 0, 0), (3, 3, 0)])
def test_a_sheet_drops_lines_of_other_samplers(versions: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "sampled.jsonl"
    with sampled_file(path, [PROMPT], policy_versions(DECODING, 2)) as sheet:
        sheet.add(sampled(version=2, weights=2))
    with sampled_file(path, [PROMPT], versions) as sheet:
        assert sheet.missing == [PROMPT] and sheet.candidates == []
