"""What the driver makes of the ranks' held-out results, and which preferences it refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from actors.supervision.processes import ActorProcess
from actors.supervision.trainers import SupervisedTrainers
from actors.trainer.group import TrainerGroup
from raylign.config.blocks import TrainerBlock
from raylign.config.losses import BradleyTerryRewardLossBlock, SftLossBlock, SigmoidLossBlock, TrainerLoss
from raylign.config.reference import NoReferenceBlock
from raylign.errors import ActorsLost, TrainerError
from raylign.evaluation.held_out import HeldOut
from raylign.records import Preference
from raylign.roles import TrainerRank
from raylign.training.preferences import require_logps
from tests.fakes import quiet_supervision
from tests.unit.actors.trainer.test_trainer_group import preference

METRICS = {"loss": 0.5}


def two_ranks(ranks: Any, timeout_s: float, what: str, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """Two ranks that share three preferences."""
    assert (method, len(args)) == (TrainerRank.evaluate, 1)
    return [(METRICS, {2: (0.3, 3.0, -3.0), 0: (0.1, 1.0, -1.0)}), (METRICS, {1: (0.2, 2.0, -2.0)})]


def test_results_come_back_in_the_order_given() -> None:
    ranks: list[Any] = [None, None]
    options: dict[str, Any] = {"loss": SigmoidLossBlock(), "reference": NoReferenceBlock(), "step_timeout_s": 1.0}
    group = TrainerGroup(ranks, **options, ask_ranks=two_ranks)
    found = group.evaluate([preference(1, 1)] * 3)
    assert found == HeldOut(METRICS, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), (-1.0, -2.0, -3.0))
    with pytest.raises(TrainerError, match="there are no held-out preferences to evaluate on; give at least one"):
        group.evaluate([])


@pytest.mark.parametrize("loss", [SftLossBlock(), BradleyTerryRewardLossBlock()])
def test_losses_without_reference_need_no_reference_logps(loss: TrainerLoss) -> None:
    require_logps([preference(2), preference(1, 1)], loss)


@pytest.mark.parametrize("known", [(), (-1.0,)])
def test_reference_logps_that_a_loss_reads_must_be_there(known: tuple[float, ...]) -> None:
    one, other = preference(1, 1), preference(1, 1)
    filled = Preference(one.prompt, one.candidates, one.scores, one.weights, (-1.0, -2.0))
    short = Preference(other.prompt, other.candidates, other.scores, other.weights, known)
    message = rf"preference 1 \(prompt p\) has {len(known)} reference log-probs for 2 candidates, and loss_type=sigmoid"
    with pytest.raises(TrainerError, match=message):
        require_logps([filled, short], SigmoidLossBlock())


class Ranks:
    """A group that loses a rank whenever it evaluates, until it is replaced."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.started = 0
        self.trainers = SupervisedTrainers(
            self._start,
            block=TrainerBlock(),
            loss=SftLossBlock(),
            reference=NoReferenceBlock(),
            adapter=False,
            supervision=quiet_supervision("trainer", TrainerError),
            ask_ranks=self._answer,
        )

    def _start(self) -> list[Any]:
        self.started += 1
        return [None]

    @property
    def replaced(self) -> int:
        return self.started - 1

    def _answer(self, ranks: Any, timeout_s: float, what: str, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
        self.calls.append(method.__name__)
        match method.__name__:
            case "begin_round":
                return [1]
            case "train_step":
                return [{"loss": 1.0}]
            case "state_bytes":
                return [0]
            case "save_state":
                return [[{"loss": 1.0}]]
            case "take_loss" | "save_weights":
                return [None]
            case "evaluate" if self.replaced:
                return [(METRICS, {0: (0.1, 1.0, -1.0)})]
            case "evaluate":
                raise ActorsLost("rank 1 died") from RayActorError()
        raise AssertionError(method)


class Record:
    index = 1

    def step(self, number: int, metrics: Any) -> None:
        """Not kept."""

    @contextmanager
    def new_checkpoint(self, steps: Any, complete: bool, needed_bytes: int) -> Iterator[Path]:
        yield Path("0001")

    def save_bad_step(self, number: int, preferences: Any) -> None:
        raise AssertionError(number)


def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.supervision.slot.kill", lambda handles: None)
    monkeypatch.setattr("actors.supervision.slot.process_of", lambda handle: ActorProcess(0, ""))


def test_between_rounds_a_new_group_evaluates(monkeypatch: pytest.MonkeyPatch) -> None:
    without_processes(monkeypatch)
    ranks = Ranks()
    assert ranks.trainers.evaluate([preference(1)]).losses == (0.1,)
    assert ranks.calls == ["take_loss", "evaluate"] * 2 and ranks.replaced == 1, "the new group knows the loss"


def test_a_rank_lost_while_a_round_is_evaluated_begins_the_round_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new group has to be told of the round before it takes another step."""
    without_processes(monkeypatch)
    ranks = Ranks()

    def evaluate(done: int) -> None:
        ranks.trainers.evaluate([preference(1)])

    assert ranks.trainers.train_round([preference(1)], 0, Record(), evaluate) == [{"loss": 1.0}]
    assert ranks.replaced == 1
    steps = ["take_loss", "begin_round", "train_step", "take_loss", "evaluate"]
    assert ranks.calls == [*steps, "take_loss", *steps, "state_bytes", "save_state", "save_weights"]
