"""What the loss blocks promise and refuse."""

import pytest
from pydantic import ValidationError

from raylign.config.losses import FunctionLossBlock, LossBlock, MixLossBlock
from tests.unit.losses.test_losses import LISTWISE, OBJECTIVES, REFERENCE_FREE, block

SIGMOID = {"loss_type": "sigmoid"}


GROUPED = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo")
"""tests/unit/losses/test_grpo.py has them."""


def test_every_objective_of_the_union_is_tested() -> None:
    members = [member for member in LossBlock.__args__ if member not in (MixLossBlock, FunctionLossBlock)]
    names = [name for member in members for name in member.model_fields["loss_type"].annotation.__args__]
    assert sorted(names) == sorted((*OBJECTIVES, *GROUPED))


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_blocks_say_what_they_read(loss_type: str) -> None:
    named = block(loss_type)
    assert named.needs_reference == (loss_type not in (*REFERENCE_FREE, "sft"))
    assert named.pairs_only == (loss_type not in LISTWISE)
    assert not named.needs_entropy_gradient and not named.needs_reference_samples and named.tail_weight == 1.0
    assert type(named).__doc__ and type(named).model_fields["loss_type"].default is not None


def test_ln2_at_start() -> None:
    starting = {name for name in OBJECTIVES if block(name).ln2_at_start}
    expected = {"sigmoid", "sigmoid_norm", "probit", "robust", "aot", "aot_unpaired", "dpop", "all_pairs_logistic"}
    assert starting == expected
    assert not block("sigmoid", use_weighting=True).ln2_at_start
    assert block("sigmoid", label_smoothing=0.3).ln2_at_start


def test_a_mix_needs_what_its_members_need() -> None:
    free = block("mix", losses=[{"loss_type": "simpo"}, {"loss_type": "sft"}])
    assert not free.needs_reference and free.pairs_only and not free.needs_entropy_gradient
    listed = block("mix", losses=[{"loss_type": "plackett_luce"}, {"loss_type": "kl"}, {"loss_type": "entropy"}])
    assert listed.needs_reference and not listed.pairs_only and listed.needs_entropy_gradient
    assert isinstance(listed, MixLossBlock) and listed.weights == (1.0, 1.0, 1.0)
    tails = block("mix", losses=[SIGMOID | {"ld_alpha": 0.3}, {"loss_type": "ipo", "ld_alpha": 0.3}])
    assert tails.tail_weight == 0.3
    exploring = block("mix", losses=[{"loss_type": "simpo"}, {"loss_type": "xpo"}])
    assert exploring.needs_reference_samples and not exploring.needs_reference and not free.needs_reference_samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SIGMOID | {"label_smoothing": 0.5}, "less than 0.5"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "less than 0.5"),
        ({"loss_type": "exo_pair", "label_smoothing": 0.0}, "greater than 0"),
        (SIGMOID | {"beta": 0.0}, "greater than 0"),
        (SIGMOID | {"ld_alpha": 1.5}, "less than or equal to 1"),
        (
            SIGMOID | {"label_smoothing": 0.1, "soft_label_scale": 2.0},
            "=0.1 and soft_label_scale=2 both",
        ),
        ({"loss_type": "aot", "use_weighting": True}, "Extra inputs are not permitted"),
        ({"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, "Extra inputs are not permitted"),
        ({"loss_type": "kl"}, "does not match any of the expected tags"),
        ({"loss_type": "xpo"}, "does not match any of the expected tags"),
        ({"loss_type": "mix", "losses": []}, r"losses=\[\] must start with an objective"),
        (
            {"loss_type": "mix", "losses": [{"loss_type": "kl"}, SIGMOID]},
            "must start with an objective",
        ),
        ({"loss_type": "mix", "losses": [{"loss_type": "xpo"}, SIGMOID]}, "must start with an objective"),
        ({"loss_type": "mix", "losses": [SIGMOID, SIGMOID]}, "name one loss twice"),
        ({"loss_type": "mix", "losses": [SIGMOID], "loss_weights": [1, 2]}, "2 entries for 1 losses; give one weight"),
        ({"loss_type": "mix", "losses": [SIGMOID], "loss_weights": [0]}, "greater than 0"),
        (
            {"loss_type": "mix", "losses": [SIGMOID | {"ld_alpha": 0.5}, {"loss_type": "sft"}]},
            "must be the same",
        ),
        ({"loss_type": "mix", "losses": [{"loss_type": "mix", "losses": [SIGMOID]}]}, "does not match any"),
    ],
)
def test_nonsense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        block(**options)  # type: ignore[arg-type]


def test_blocks_survive_a_round_trip() -> None:
    mix = block("mix", losses=[{"loss_type": "apo_down"}, {"loss_type": "sft"}], loss_weights=[1.0, 0.2])
    assert block(**mix.model_dump()) == mix
