"""A trainer group that outlives its ranks: one is lost, all are replaced and go on from the newest checkpoint."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray

from actors.calls import ask_all
from actors.supervision.endings import Loss, loss_of
from actors.supervision.processes import kill
from actors.supervision.slot import Slot, Supervision
from actors.supervision.turns import OwnDevices, Turns
from actors.supervision.watch import Guard, cured, get_all, get_together, guarded
from actors.trainer.actor import TrainerActor, TrainerSpec, free_address
from actors.trainer.group import AskRanks, Rank, TrainerGroup, ask_ranks
from raylign.config.blocks import TrainerBlock
from raylign.config.losses import TrainerLoss
from raylign.config.reference import ReferenceBlock
from raylign.errors import ActorsLost, RaylignError, TrainerError
from raylign.evaluation.held_out import HeldOut
from raylign.records import Preference
from raylign.roles import RoundRecord, TrainerRank
from raylign.run.checkpoints import PARTIAL, Checkpoint, Metrics

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Start = Callable[[], Sequence[Rank]]
"""Starts all ranks and returns their handles once the group has formed."""

STATE = "trainer"
"""Folder of a checkpoint with the trainer's state; the policy lies beside it."""
_NAME = "trainers"
_PORT_ATTEMPTS = 5
_IN_USE = "address already in use"
_TOO_SMALL = (
    "the cluster may have lost a node that the ranks need: give it back or lower trainer.ranks, then run the same "
    "command again (raylign resume RUN trainer.ranks=...): it goes on where it stopped"
)
_CURE = (
    "the newest checkpoint is as it was before these steps. Lower trainer.learning_rate or set model.dtype=float32, "
    "then go on: raylign resume RUN trainer.learning_rate=..."
)


class SupervisedTrainers(TrainerGroup):
    """Every call survives the loss of ranks. `restore` and `train_round` say where a new group goes on from."""

    def __init__(
        self,
        start: Start,
        *,
        block: TrainerBlock,
        loss: TrainerLoss,
        reference: ReferenceBlock,
        adapter: bool,
        supervision: Supervision,
        turns: Turns | None = None,
        ask_ranks: AskRanks = ask_ranks,
    ) -> None:
        super().__init__((), loss=loss, reference=reference, step_timeout_s=block.step_timeout_s, ask_ranks=ask_ranks)
        self._turns = turns or OwnDevices()
        self._start, self._block, self._adapter = start, block, adapter
        self._slot: Slot[TrainerRank] = Slot(supervision, _NAME, [f"trainer-{rank}" for rank in range(block.ranks)])
        self._newest: Checkpoint | None = None
        self._in_round = False
        self.guard = Guard()
        self._start_first()

    def _start_first(self) -> None:
        """Raises TrainerError when the ranks cannot start; those that are lost while they load are replaced."""
        try:
            self._fill()
        except ActorsLost as lost:
            loss = loss_of(lost)
            if loss.kind in ("start", "silent"):
                raise cured(TrainerError(str(lost)), loss, "trainer") from lost
            self._replace(loss)

    def _fill(self) -> None:
        self._turns.trainers_start()
        self.handles = tuple(self._start())
        self._slot.fill(self.handles)

    @guarded
    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Go on from the checkpoint, now and whenever ranks are lost; None is the model as it was loaded."""
        self._newest = checkpoint
        if checkpoint:
            self.load_state(str(checkpoint.folder / STATE))

    def take_loss(self, loss: TrainerLoss) -> None:
        """Evaluate by it, and train from the next round on; ranks are told before they do, new ones at their start."""
        self._loss = loss

    @guarded
    def evaluate(self, preferences: Sequence[Preference]) -> HeldOut:
        self._call("taking the loss", 1, TrainerRank.take_loss, self._loss)
        return super().evaluate(preferences)

    @guarded
    def train_round(
        self, preferences: Sequence[Preference], seed: int, record: RoundRecord, advance: Callable[[int], None]
    ) -> list[Metrics]:
        """Train round `record.index` and save its checkpoint; returns the metrics of all its steps.

        What a checkpoint in the middle of the round has done is not done again. Interrupted, it saves such a one.
        `advance` gets the number of further steps done; it may call `evaluate`.
        Raises TrainerError after `trainer.max_skipped_steps` steps in a row that are not finite.
        """
        self._in_round = True
        try:
            return self._train_round(preferences, seed, record, advance)
        finally:
            self._in_round = False

    def _train_round(
        self, preferences: Sequence[Preference], seed: int, record: RoundRecord, advance: Callable[[int], None]
    ) -> list[Metrics]:
        shown = 0
        while True:
            try:
                done = self._steps_of(record.index)
                for number, _ in self._steps(preferences, seed, record, done):
                    advance(max(0, number - shown))
                    shown = max(shown, number)
                return self._save(record, complete=True)
            except ActorsLost as lost:
                self._replace(self._slot.diagnosed(loss_of(lost)))
            except KeyboardInterrupt:
                log.warning("saving what is trained of round %d", record.index)
                self._save(record, complete=False)
                raise

    def _steps_of(self, index: int) -> tuple[Metrics, ...]:
        """Of round `index`, those that the newest checkpoint has done."""
        newest = self._newest
        return newest.steps if newest and newest.round == index and not newest.complete else ()

    def _steps(
        self, preferences: Sequence[Preference], seed: int, record: RoundRecord, done: Sequence[Metrics]
    ) -> Iterator[tuple[int, Metrics]]:
        """Yields the number (from 1) and metrics of each further step."""
        self.once(TrainerRank.take_loss, self._loss)
        count = self.once(TrainerRank.begin_round, tuple(preferences), seed, record.index - 1, tuple(done))
        bad_in_a_row = 0
        for number in range(len(done) + 1, count + 1):
            metrics = self.once(TrainerRank.train_step)
            record.step(number, metrics)
            bad_in_a_row = bad_in_a_row + 1 if metrics.get("non_finite_steps") else 0
            if bad_in_a_row:
                record.save_bad_step(number, [preferences[i] for i in self.once(TrainerRank.step_indices, number - 1)])
            if bad_in_a_row >= self._block.max_skipped_steps:
                raise TrainerError(
                    f"round {record.index}: the last {bad_in_a_row} steps (up to {number}) had a loss or gradient that "
                    f"is not finite, limit trainer.max_skipped_steps={self._block.max_skipped_steps}; {_CURE}"
                )
            yield number, metrics
            if self._block.save_steps and number % self._block.save_steps == 0 and number < count:
                self._save(record, complete=False)

    def _save(self, record: RoundRecord, *, complete: bool) -> list[Metrics]:
        needed = self.once(TrainerRank.state_bytes)
        steps: list[Metrics] = []
        # The ranks say what they have done: a signal may come between a step and its report.
        with record.new_checkpoint(steps, complete, needed) as folder:
            steps += self.once(TrainerRank.save_state, str(folder / STATE), record.index)
            if self._adapter:
                self.once(TrainerRank.save_adapter, str(folder))
            else:
                self.once(TrainerRank.save_weights, str(folder / "model.safetensors"))
        name = f"{record.index:04d}{'' if complete else PARTIAL}"
        self._newest = Checkpoint(folder.with_name(name), record.index, complete, tuple(steps))
        return steps

    def once(self, method: Callable[Concatenate[TrainerRank, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Rank 0's answer, or ActorsLost: for calls that a replaced group must not simply repeat."""
        with self.guard.in_use():
            self._turns.trainers(method)
            return super()._call(method.__name__.replace("_", " "), 1, method, *args, **kwargs)[0]

    def _call(
        self, what: str, steps: int, method: Callable[Concatenate[TrainerRank, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> list[T]:
        """Between rounds the newest checkpoint is what the ranks hold, so that a new group can answer as well."""
        with self.guard.in_use():
            while True:
                try:
                    self._turns.trainers(method)
                    return super()._call(what, steps, method, *args, **kwargs)
                except ActorsLost as lost:
                    if self._in_round:
                        raise  # to `train_round`, which knows where a new group goes on from
                    self._replace(self._slot.diagnosed(loss_of(lost)))

    def offload(self, *, keep_weights: bool) -> None:
        """Leave the GPUs, but for the policy's weights where they are kept. Asked by `Turns`."""
        super()._call("leaving the GPU", 1, TrainerRank.offload, keep_weights=keep_weights)

    def reload(self, *, weights_alone: bool) -> None:
        """Come back to the GPUs."""
        super()._call("coming back to the GPU", 1, TrainerRank.reload, weights_alone=weights_alone)

    @guarded
    def replace_dead(self) -> None:
        """New ranks when one is dead; between rounds the newest checkpoint is what they hold."""
        if loss := self._slot.loss():
            self._replace(loss)

    def _replace(self, loss: Loss) -> None:
        """New ranks that go on from the newest checkpoint, once their nodes have room for them.

        Raises TrainerError past the cap of restarts, and when they do not start in time, as where a node is gone.
        """
        while True:
            self._slot.lost(loss)
            self._slot.wait_for_room(self.guard.sleep)
            try:
                self._fill()
                self.once(TrainerRank.take_loss, self._loss)
                if self._newest:
                    self._newest.require_whole()
                    self.once(TrainerRank.load_state, str(self._newest.folder / STATE))
            except ActorsLost as again:
                if again.__cause__ is None:
                    raise TrainerError(f"{again}; {_TOO_SMALL}") from again
                loss = self._slot.diagnosed(loss_of(again))
                continue
            self._slot.recovered()
            return


def start_ranks(spec: TrainerSpec, options: Sequence[Mapping[str, Any]]) -> list[Rank]:
    """Every rank, once the group has formed; `options` are Ray's, rank by rank.

    Raises ActorsLost or TrainerError when it does not; a port that somebody took meanwhile is tried again.
    """
    timeout_s = spec.trainer.start_timeout_s
    attempts = 0
    while True:
        address, port = _meeting_place(options[0], timeout_s)
        handles: list[Rank] = [
            TrainerActor.options(**own).remote(spec, rank, address, port) for rank, own in enumerate(options)
        ]
        attempts += 1
        try:
            get_together(ask_all(handles, TrainerRank.ready), timeout_s, "starting the trainers", TrainerError)
            return handles
        except (RaylignError, KeyboardInterrupt) as error:
            kill(handles)
            if attempts >= _PORT_ATTEMPTS or _IN_USE not in str(error).lower():
                raise


def _meeting_place(options: Mapping[str, Any], timeout_s: float) -> tuple[str, int]:
    """A free address on the node of the rank with these options.

    Where this node is the only one, no process is started to tell.
    """
    if sum(node["Alive"] for node in ray.nodes()) == 1:
        return free_address()
    find = ray.remote(free_address).options(**{**options, "num_cpus": 0, "num_gpus": 0})
    return get_all([find.remote()], timeout_s, "finding a port", TrainerError)[0]
