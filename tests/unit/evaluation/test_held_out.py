"""What the driver makes of the ranks' held-out results, and which preferences it refuses."""

from pathlib import Path
from typing import Any

import pytest

from actors.supervision.endings import Loss
from actors.supervision.incidents import Incidents
from actors.supervision.trainers import SupervisedTrainers
from actors.trainer.group import TrainerGroup
from raylign.config.blocks import RecoveryBlock, TrainerBlock
from raylign.config.losses import BradleyTerryRewardLossBlock, SftLossBlock, SigmoidLossBlock, TrainerLoss
from raylign.config.reference import NoReferenceBlock
from raylign.errors import ActorsLost, TrainerError
from raylign.evaluation.held_out import HeldOut
from raylign.records import Preference
from raylign.reference.logps import require_reference
from tests.unit.actors.trainer.test_trainer_group import preference

METRICS = {"loss": 0.5}


class Ranks(TrainerGroup):
    """Two ranks that share three preferences."""

    def put(self, preferences: Any) -> Any:
        return preferences

    def _ask(self, method: str, *args: object, what: str, steps: int) -> list[Any]:
        assert (method, len(args)) == ("evaluate", 1)
        return [(METRICS, {2: (0.3, 3.0, -3.0), 0: (0.1, 1.0, -1.0)}), (METRICS, {1: (0.2, 2.0, -2.0)})]


def test_results_come_back_in_the_order_given() -> None:
    group = Ranks([None, None], loss=SigmoidLossBlock(), reference=NoReferenceBlock(), step_timeout_s=1.0)  # type: ignore[list-item]
    found = group.evaluate([preference(1, 1)] * 3)
    assert found == HeldOut(METRICS, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), (-1.0, -2.0, -3.0))
    with pytest.raises(TrainerError, match="there are no held-out preferences to evaluate on; give at least one"):
        group.evaluate([])


@pytest.mark.parametrize("loss", [SftLossBlock(), BradleyTerryRewardLossBlock()])
def test_losses_without_reference_need_no_reference_logps(loss: TrainerLoss) -> None:
    require_reference([preference(2), preference(1, 1)], loss)


@pytest.mark.parametrize("known", [(), (-1.0,)])
def test_reference_logps_that_a_loss_reads_must_be_there(known: tuple[float, ...]) -> None:
    one, other = preference(1, 1), preference(1, 1)
    filled = Preference(one.prompt, one.candidates, one.scores, one.weights, (-1.0, -2.0))
    short = Preference(other.prompt, other.candidates, other.scores, other.weights, known)
    message = rf"preference 1 \(prompt p\) has {len(known)} reference log-probs for 2 candidates, and loss_type=sigmoid"
    with pytest.raises(TrainerError, match=message):
        require_reference([filled, short], SigmoidLossBlock())


class Lost(SupervisedTrainers):
    """A group that loses a rank whenever it evaluates, until it is replaced."""

    def __init__(self) -> None:
        super().__init__(
            lambda: [None],  # type: ignore[list-item]
            block=TrainerBlock(),
            loss=SftLossBlock(),
            reference=NoReferenceBlock(),
            adapter=False,
            incidents=Incidents(RecoveryBlock(), lambda role, happened, detail: None),
            stacks=Path(),
        )
        self.calls: list[str] = []
        self.replaced = 0

    def put(self, preferences: Any) -> Any:
        return preferences

    def _ask(self, method: str, *args: object, what: str, steps: int) -> list[Any]:
        self.calls.append(method)
        match method:
            case "begin_round":
                return [1]
            case "train_step":
                return [{"loss": 1.0}]
            case "state_bytes":
                return [0]
            case "evaluate" if self.replaced:
                return [(METRICS, {0: (0.1, 1.0, -1.0)})]
            case "evaluate":
                raise ActorsLost("rank 1 died") from RuntimeError("killed")
        raise AssertionError(method)

    def _replace(self, loss: Loss) -> None:
        self.replaced += 1

    def _save(self, record: Any, *, complete: bool) -> list[Any]:
        return [{"loss": 1.0}]


class Record:
    index = 1

    def step(self, number: int, metrics: Any) -> None:
        """Not kept."""


def test_between_rounds_a_new_group_evaluates() -> None:
    trainers = Lost()
    assert trainers.evaluate([preference(1)]).losses == (0.1,)
    assert trainers.calls == ["evaluate", "evaluate"] and trainers.replaced == 1


def test_a_rank_lost_while_a_round_is_evaluated_begins_the_round_again() -> None:
    """A new group has to be told of the round before it takes another step."""
    trainers = Lost()
    steps = trainers.train_round([preference(1)], 0, Record(), lambda done: void(trainers))  # type: ignore[arg-type]
    assert steps == [{"loss": 1.0}] and trainers.replaced == 1
    assert trainers.calls == ["begin_round", "train_step", "evaluate", "begin_round", "train_step", "evaluate"]


def void(trainers: SupervisedTrainers) -> None:
    trainers.evaluate([preference(1)])
