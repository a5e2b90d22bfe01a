"""Whose turn it is on GPUs that generators and trainers share: what the others hold there has left before.

While trainers work the engines sleep (vLLM's sleep mode); while engines sample, what the trainers hold lies in main
memory. Around a publish both hold their weights, and nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from raylign.errors import GeneratorError
from raylign.roles import Generator, TrainerRank

Held = Literal["nothing", "weights", "all"]
"""What actors of a role hold on their GPUs."""
Method = Callable[..., Any]
KV_CACHE, WEIGHTS = "kv_cache", "weights"
"""vLLM's names for the parts that wake up apart."""

_ENGINES_NEED: Mapping[Method, Held] = {
    Generator.sample: "all",
    Generator.token_logps: "all",
    Generator.pause: "weights",
    Generator.take_weights: "weights",
    Generator.take_adapter: "weights",
}
"""Of all others nothing."""
_TRAINERS_NEED: Mapping[Method, Held] = {
    TrainerRank.ready: "nothing",
    TrainerRank.layout: "nothing",
    TrainerRank.free_address: "nothing",
    TrainerRank.state_bytes: "nothing",
    TrainerRank.step_indices: "nothing",
    TrainerRank.take_loss: "nothing",
    TrainerRank.token_logps: "weights",
    TrainerRank.save_weights: "weights",
    TrainerRank.save_adapter: "weights",
    TrainerRank.send_weights: "weights",
}
"""Of all others everything."""
_BEFORE_A_PUBLISH = {
    TrainerRank.reference_candidates,
    TrainerRank.old_logprobs,
    TrainerRank.begin_round,
    TrainerRank.train_step,
}
"""What a round does between sampling and its publish: nothing is sampled before engines get other weights."""
_GIVES_WEIGHTS = {Generator.take_weights, Generator.take_adapter, Generator.label}


class Sleepers(Protocol):
    """The generators, as far as their GPUs' memory goes. Whoever is lost meanwhile is found by the next call."""

    def sleep(self, level: Literal[1, 2]) -> None:
        """Leave the GPUs; at level 1 weights are kept in main memory, at level 2 they are gone."""

    def wake_up(self, tags: Sequence[str]) -> None:
        """Take the GPUs' memory for these parts again."""


class Movers(Protocol):
    """The trainers, likewise."""

    def offload(self, *, keep_weights: bool) -> None:
        """Leave the GPUs, but for the model's weights where they are kept."""

    def reload(self, *, weights_alone: bool) -> None:
        """Come back to the GPUs."""


class Turns(Protocol):
    """Asked before every call of the two roles."""

    @property
    def shared(self) -> bool:
        """Whether generators and trainers share GPUs."""
        ...

    def engines(self, method: Method) -> None:
        """Make the GPUs fit for a call of `method` of all generators."""

    def engines_done(self, method: Method) -> None:
        """It has succeeded."""

    def engine_starts(self) -> None:
        """Make room for an engine, which takes all that it will ever hold."""

    def engine_joins(self) -> tuple[Literal[1, 2] | None, Sequence[str]]:
        """What an engine that has started does to hold what the others do: how deep to sleep, what to wake."""
        ...

    def trainers(self, method: Method) -> None:
        """Make the GPUs fit for a call of `method` of all ranks."""

    def trainers_start(self) -> None:
        """Make room for ranks, which hold everything then."""


class OwnDevices:
    """Every actor has devices of its own, or main memory, which has room for all."""

    shared = False

    def engines(self, method: Method) -> None: ...
    def engines_done(self, method: Method) -> None: ...
    def engine_starts(self) -> None: ...

    def engine_joins(self) -> tuple[Literal[1, 2] | None, Sequence[str]]:
        return None, ()

    def trainers(self, method: Method) -> None: ...
    def trainers_start(self) -> None: ...


class SharedDevices:
    """Generators and trainers take turns. `replaces`: a publish gives engines all of their weights anew."""

    shared = True

    def __init__(self, *, replaces: bool) -> None:
        self._replaces = replaces
        self.sleepers: Sleepers | None = None
        self.movers: Movers | None = None
        self._engines: Held = "nothing"
        self._trainers: Held = "nothing"
        self._emptied = False
        """Whether the engines sleep without weights, or have woken up with any that were there."""

    def engines(self, method: Method) -> None:
        match _ENGINES_NEED.get(method, "nothing"):
            case "weights" if self._engines == "nothing":
                self._trainers_leave(keep_weights=True)
                self._wake(WEIGHTS)
                self._engines = "weights"
            case "all" if self._engines != "all":
                if self._emptied:
                    raise GeneratorError(
                        "the generators' weights were left behind when they went to sleep before training, and none "
                        "were published since; run the same command again: it goes on from the newest checkpoint"
                    )
                self._trainers_leave(keep_weights=False)
                self._wake(*([WEIGHTS] if self._engines == "nothing" else []), KV_CACHE)
                self._engines = "all"

    def engines_done(self, method: Method) -> None:
        if method in _GIVES_WEIGHTS:
            self._emptied = False

    def engine_starts(self) -> None:
        self._trainers_leave(keep_weights=False)

    def engine_joins(self) -> tuple[Literal[1, 2] | None, Sequence[str]]:
        match self._engines:
            case "all":
                return None, ()
            case "weights":
                return 1, (WEIGHTS,)
            case "nothing":
                return 1, ()

    def engines_started(self, sleepers: Sleepers) -> None:
        """The first engines have started, on GPUs that no trainer was on yet."""
        self.sleepers, self._engines = sleepers, "all"

    def trainers(self, method: Method) -> None:
        match _TRAINERS_NEED.get(method, "all"):
            case "weights" if self._trainers == "nothing":
                if self._engines == "all":
                    self._sleep(1)
                self._reload(weights_alone=True)
                self._trainers = "weights"
            case "all" if self._trainers != "all":
                self._engines_leave(2 if self._replaces and method in _BEFORE_A_PUBLISH else 1)
                self._reload(weights_alone=False)
                self._trainers = "all"

    def trainers_start(self) -> None:
        self._engines_leave(1)
        self._trainers = "all"

    def _engines_leave(self, level: Literal[1, 2]) -> None:
        if self._engines != "nothing":
            self._sleep(level)
            self._emptied = self._emptied or level == 2

    def _sleep(self, level: Literal[1, 2]) -> None:
        if self.sleepers is not None:
            self.sleepers.sleep(level)
        self._engines = "nothing"

    def _wake(self, *tags: str) -> None:
        if self.sleepers is not None:
            self.sleepers.wake_up(tags)

    def _trainers_leave(self, *, keep_weights: bool) -> None:
        held: Held = "weights" if keep_weights else "nothing"
        if self.movers is not None and self._trainers not in ("nothing", held):
            self.movers.offload(keep_weights=keep_weights)
            self._trainers = held

    def _reload(self, *, weights_alone: bool) -> None:
        if self.movers is not None:
            self.movers.reload(weights_alone=weights_alone)
