"""Decoding options and seeds."""

from raylign.config.blocks import SamplingBlock
from raylign.config.evaluation import EvaluationBlock
from raylign.sampling.decoding import Decoding, evaluation_decoding, policy_versions, prompt_seed, training_decoding

SAMPLING = SamplingBlock(num_generations=6, max_new_tokens=48, temperature=0.7, top_p=0.9, top_k=40)


def test_training_draws_as_the_recipe_says() -> None:
    assert training_decoding(SAMPLING) == Decoding(6, 48, 0.7, 0.9, 40)


def test_the_last_candidates_are_the_initial_models() -> None:
    decoding = training_decoding(SamplingBlock(num_generations=3, reference_generations=2))
    assert decoding.reference_generations == 2
    assert policy_versions(decoding, 4) == (4, 0, 0)
    assert policy_versions(training_decoding(SAMPLING), 4) == (4,) * 6


def test_evaluation_draws_from_the_whole_distribution() -> None:
    assert evaluation_decoding(SAMPLING, EvaluationBlock(num_generations=2)) == Decoding(2, 48, 1.0, 1.0, 0)
    assert evaluation_decoding(SAMPLING, EvaluationBlock(temperature=0)) == Decoding(1, 48, 0.0, 1.0, 0)
    apart = SAMPLING.model_copy(update={"reference_generations": 1})
    assert evaluation_decoding(apart, EvaluationBlock()).reference_generations == 0


def test_a_seed_by_hand() -> None:
    # printf 7/3/h000002 | sha256sum starts with fccba53e; that is 4241204542, less 2**31
    assert prompt_seed(7, 3, "h000002") == 0xFCCBA53E - (1 << 31) == 2093720894


def test_a_seed_is_its_own_for_every_run_round_and_prompt() -> None:
    seeds = {prompt_seed(run, index, f"p{row}") for run in range(4) for index in range(10) for row in range(50)}
    assert len(seeds) == 4 * 10 * 50
    assert all(0 <= seed < 1 << 31 for seed in seeds)
    assert prompt_seed(1, 2, "p3") == prompt_seed(1, 2, "p3")
