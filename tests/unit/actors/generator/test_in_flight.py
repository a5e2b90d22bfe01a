"""Which generator gets which prompt, and who has been silent for how long."""

import pytest

from actors.supervision.generators import InFlight
from raylign.records import Prompt
from raylign.sampling.decoding import Decoding

FOUR = Decoding(num_generations=4, max_new_tokens=8, temperature=1.0, top_p=1.0, top_k=0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the module believes in; the last one is now."""
    times = [0.0]
    monkeypatch.setattr("actors.supervision.generators.time.monotonic", lambda: times[-1])
    return times


def work_of(count: int) -> InFlight:
    prompts = [Prompt(f"p{number}", (), (1,)) for number in range(count)]
    return InFlight(prompts, FOUR, max_num_seqs=4)


def send(work: InFlight, slots: list[int]) -> list[tuple[str, int]]:
    """Send what is next; the reference of a call is its prompt's id."""
    sent = work.next_for(slots)
    for prompt, slot in sent:
        work.sent(prompt.id, prompt, slot)
    return [(prompt.id, slot) for prompt, slot in sent]


def test_slots_get_prompts_in_turn_up_to_two_batches_each() -> None:
    work = work_of(5)
    assert send(work, [0, 1]) == [("p0", 0), ("p1", 1), ("p2", 0), ("p3", 1)]
    assert send(work, [0, 1]) == [] and work.refs == ["p0", "p1", "p2", "p3"]
    assert work.finished("p1").id == "p1" and send(work, [0, 1]) == [("p4", 1)]
    for ref in list(work.refs):
        work.finished(ref)
    assert not work


def test_what_a_lost_generator_had_goes_first_and_in_order() -> None:
    work = work_of(6)
    send(work, [0, 1])
    work.give_back(0)
    assert work.slot_of("p0") is None and work.slot_of("p1") == 1
    assert send(work, [0, 1]) == [("p0", 0), ("p2", 0)]
    assert work and send(work, []) == []


def test_only_slots_with_work_can_be_silent_and_each_has_its_own_time(clock: list[float]) -> None:
    work = work_of(6)
    send(work, [0, 1])
    clock.append(9.0)
    work.finished("p1")
    assert work.silent(10.0) == []
    clock.append(11.0)
    assert work.silent(10.0) == [0]
    work.give_back(0)
    clock.append(20.0)
    assert work.silent(10.0) == [1]


def test_a_slot_that_was_idle_starts_anew(clock: list[float]) -> None:
    """A replacement is not blamed for the silence of the one before it."""
    work = work_of(2)
    send(work, [0])
    work.give_back(0)
    clock.append(100.0)
    send(work, [0])
    assert work.silent(10.0) == []
