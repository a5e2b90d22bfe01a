"""A trainer group that outlives its ranks: one is lost, all are replaced and go on from the newest checkpoint."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle

from actors.supervision.endings import Loss, ended, explains, loss_of
from actors.supervision.incidents import Incidents
from actors.supervision.processes import kill, process_of
from actors.supervision.stacks import dump_stacks
from actors.supervision.waiting import cured, get_all, get_together
from actors.supervision.watch import Guard, attended
from actors.trainer.actor import TrainerRank, TrainerSpec
from actors.trainer.group import TrainerGroup
from actors.trainer.network import free_address
from raylign.config.blocks import TrainerBlock
from raylign.config.losses import TrainerLoss
from raylign.config.reference import ReferenceBlock
from raylign.errors import ActorsLost, RaylignError, TrainerError
from raylign.records import Preference
from raylign.run.checkpoints import PARTIAL, Checkpoint, Metrics

log = logging.getLogger(__name__)

Start = Callable[[], Sequence[ActorHandle[Any]]]
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


class RoundRecord(Protocol):
    """What a round in training writes to; `raylign.run.rounds.RoundLog` is one."""

    @property
    def index(self) -> int: ...

    def step(self, number: int, metrics: Metrics) -> None: ...

    def new_checkpoint(
        self, steps: Sequence[Metrics], complete: bool, needed_bytes: int
    ) -> AbstractContextManager[Path]: ...

    def save_bad_step(self, number: int, preferences: Sequence[Preference]) -> None: ...


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
        incidents: Incidents,
        stacks: Path,
    ) -> None:
        super().__init__((), loss=loss, reference=reference, step_timeout_s=block.step_timeout_s)
        self._start, self._block, self._adapter, self._incidents, self._stacks = (
            start,
            block,
            adapter,
            incidents,
            stacks,
        )
        self._newest: tuple[Checkpoint, ...] = ()
        self._in_round = False
        self.guard = Guard()
        self._start_first()

    def _start_first(self) -> None:
        """Raises TrainerError when the ranks cannot start; those that are lost while they load are replaced."""
        try:
            self.handles = tuple(self._start())
        except ActorsLost as lost:
            loss = loss_of(lost)
            if loss.kind in ("start", "silent"):
                raise cured(TrainerError(str(lost)), loss, "trainer") from lost
            self._replace(loss)

    @attended
    def restore(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Go on from the checkpoint, now and whenever ranks are lost; [] is the model as it was loaded."""
        self._newest = tuple(checkpoints)
        for checkpoint in checkpoints:
            self.load_state(str(checkpoint.folder / STATE))

    @attended
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
                self._replace(self._diagnosed(lost))
            except KeyboardInterrupt:
                log.warning("saving what is trained of round %d", record.index)
                self._save(record, complete=False)
                raise

    def _steps_of(self, index: int) -> tuple[Metrics, ...]:
        """Of round `index`, those that the newest checkpoint has done."""
        return next((c.steps for c in self._newest if c.round == index and not c.complete), ())

    def _steps(
        self, preferences: Sequence[Preference], seed: int, record: RoundRecord, done: Sequence[Metrics]
    ) -> Iterator[tuple[int, Metrics]]:
        """Yields the number (from 1) and metrics of each further step."""
        count = self.once("begin_round", self.put(preferences), seed, record.index - 1, tuple(done))
        bad_in_a_row = 0
        for number in range(len(done) + 1, count + 1):
            metrics: Metrics = self.once("train_step")
            record.step(number, metrics)
            bad_in_a_row = bad_in_a_row + 1 if metrics.get("non_finite_steps") else 0
            if bad_in_a_row:
                record.save_bad_step(number, [preferences[i] for i in self.once("step_indices", number - 1)])
            if bad_in_a_row >= self._block.max_skipped_steps:
                raise TrainerError(
                    f"round {record.index}: the last {bad_in_a_row} steps (up to {number}) had a loss or gradient that "
                    f"is not finite, limit trainer.max_skipped_steps={self._block.max_skipped_steps}; {_CURE}"
                )
            yield number, metrics
            if self._block.save_steps and number % self._block.save_steps == 0 and number < count:
                self._save(record, complete=False)

    def _save(self, record: RoundRecord, *, complete: bool) -> list[Metrics]:
        needed = self.once("state_bytes")
        steps: list[Metrics] = []
        # The ranks say what they have done: a signal may come between a step and its report.
        with record.new_checkpoint(steps, complete, needed) as folder:
            steps += self.once("save_state", str(folder / STATE), record.index)
            if self._adapter:
                self.once("save_adapter", str(folder))
            else:
                self.once("save_weights", str(folder / "model.safetensors"))
        name = f"{record.index:04d}{'' if complete else PARTIAL}"
        self._newest = (Checkpoint(folder.with_name(name), record.index, complete, tuple(steps)),)
        return steps

    @attended
    def once(self, method: str, *args: object) -> Any:
        """Rank 0's answer, or ActorsLost: for calls that a replaced group must not simply repeat."""
        return self._ask(method, *args, what=method.replace("_", " "), steps=1)[0]

    @attended
    def _call(self, method: str, *args: object, what: str, steps: int) -> list[Any]:
        """Between rounds the newest checkpoint is what the ranks hold, so that a new group can answer as well."""
        while True:
            try:
                return self._ask(method, *args, what=what, steps=steps)
            except ActorsLost as lost:
                if self._in_round:
                    raise  # to `train_round`, which knows where a new group goes on from
                self._replace(self._diagnosed(lost))

    def _diagnosed(self, lost: ActorsLost) -> Loss:
        """What was lost; of ranks that did not answer also where their stacks are."""
        loss = loss_of(lost)
        if loss.kind != "silent":
            return loss
        where = [dump_stacks(handle, self._stacks, f"trainer-{rank}") for rank, handle in enumerate(self.handles)]
        return Loss("silent", "; ".join([loss.cause, *where]))

    def tend(self) -> None:
        """New ranks when one is dead; between rounds the newest checkpoint is what they hold."""
        if losses := [loss for handle in self.handles if (loss := ended(handle))]:
            self._replace(min(losses, key=explains))

    def _replace(self, loss: Loss) -> None:
        """New ranks that go on from the newest checkpoint, once their nodes have room for them.

        Raises TrainerError past the cap of restarts, and when they do not start in time, as where a node is gone.
        """
        while True:
            pause = self._incidents.lost("trainer", _NAME, loss, TrainerError, self._node_of(loss))
            kill(self.handles)
            pause.wait(self.guard.sleep, lambda: self._incidents.late("trainer", _NAME, TrainerError))
            try:
                self.handles = tuple(self._start())
                for checkpoint in self._newest:
                    checkpoint.require_whole()
                    self.once("load_state", str(checkpoint.folder / STATE))
            except ActorsLost as again:
                if again.__cause__ is None:
                    raise TrainerError(f"{again}; {_TOO_SMALL}") from again
                loss = self._diagnosed(again)
                continue
            self._incidents.recovered("trainer", _NAME)
            return

    def _node_of(self, loss: Loss) -> str:
        """The node of the rank that died, where its process did."""
        dead = (handle for handle in self.handles if loss.kind == "process" and ended(handle))
        return next((process_of(handle).node for handle in dead), "")


def start_ranks(spec: TrainerSpec, options: Sequence[Mapping[str, Any]]) -> list[ActorHandle[Any]]:
    """Every rank, once the group has formed; `options` are Ray's, rank by rank.

    Raises ActorsLost or TrainerError when it does not; a port that somebody took meanwhile is tried again.
    """
    timeout_s = spec.trainer.start_timeout_s
    find = ray.remote(free_address).options(**{**options[0], "num_cpus": 0, "num_gpus": 0})
    attempts = 0
    while True:
        address, port = get_all([find.remote()], timeout_s, "finding a port", TrainerError)[0]
        handles = [TrainerRank.options(**own).remote(spec, rank, address, port) for rank, own in enumerate(options)]
        attempts += 1
        try:
            get_together(
                [handle.ready.remote() for handle in handles], timeout_s, "starting the trainers", TrainerError
            )
            return handles
        except (RaylignError, KeyboardInterrupt) as error:
            kill(handles)
            if attempts >= _PORT_ATTEMPTS or _IN_USE not in str(error).lower():
                raise
