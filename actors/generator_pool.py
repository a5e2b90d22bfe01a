"""1..N generators behind one port: prompts are spread over them and come back in order."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.waiting import get_all, get_together
from raylign.errors import GeneratorError
from raylign.records import Candidate, Prompt
from raylign.sampling import Decoding, prompt_seed


class GeneratorPool:
    """All generators serve the same policy version whenever `sample` is called."""

    def __init__(self, handles: Sequence[ActorHandle[Any]], *, max_num_seqs: int, timeout_s: float) -> None:
        self.handles = tuple(handles)
        self.served = 0
        """The policy version that was published last, or is being published."""
        self.pushed = False
        """Whether weights were ever sent; until then every generator serves what it has loaded."""
        self._max_num_seqs = max_num_seqs
        self._timeout_s = timeout_s

    def sample(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        seed: int,
        round_index: int,
        version: int,
        advance: Callable[[int], None],
        on_finished: Callable[[Sequence[Candidate]], None] = lambda candidates: None,
    ) -> list[Candidate]:
        """K candidates per prompt, prompt-major and in index order. `advance(1)` is called as each prompt finishes.

        Raises GeneratorError when a generator dies or no prompt finishes within the deadline.
        """
        queue = deque(prompts)
        slots = deque(list(range(len(self.handles))) * self._prompts_in_flight(decoding))
        waiting: dict[Any, tuple[str, int]] = {}
        finished: dict[str, list[Candidate]] = {}
        while queue or waiting:
            while queue and slots:
                prompt, slot = queue.popleft(), slots.popleft()
                request_seed = prompt_seed(seed, round_index, prompt.id)
                ref: Any = self.handles[slot].sample.remote(prompt, decoding, request_seed, version)
                waiting[ref] = (prompt.id, slot)
            done, _ = ray.wait(list(waiting), timeout=self._timeout_s)
            if not done:
                ids = ", ".join(sorted(prompt_id for prompt_id, _ in waiting.values())[:5])
                raise GeneratorError(
                    f"no prompt finished within {self._timeout_s:g} s; {len(waiting)} waiting ({ids}, ...); "
                    "raise generators.request_timeout_s or look at the generator's log"
                )
            for ref in done:
                prompt_id, slot = waiting.pop(ref)
                finished[prompt_id] = get_all([ref], self._timeout_s, f"sampling prompt {prompt_id}", GeneratorError)[0]
                slots.append(slot)
                on_finished(finished[prompt_id])
                advance(1)
        return [candidate for prompt in prompts for candidate in finished[prompt.id]]

    def _prompts_in_flight(self, decoding: Decoding) -> int:
        """Per generator: enough to fill every batch slot, with one batch waiting."""
        return 2 * math.ceil(self._max_num_seqs / decoding.num_generations)

    def call(self, method: str, *args: object, timeout_s: float, what: str) -> list[Any]:
        """Call `method` on every generator at once; results in generator order. Raises ActorsLost when one has died."""
        refs = [getattr(handle, method).remote(*args) for handle in self.handles]
        return get_together(refs, timeout_s, what, GeneratorError)

    def replace_all(self, cause: str) -> None:
        """There is nobody to replace these. Raises GeneratorError."""
        raise GeneratorError(cause)
