"""Which candidates are samples of the reference."""

from typing import assert_never

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


def reference_version(block: ReferenceBlock, rounds_done: int) -> int | None:
    """The policy version that is the reference while `rounds_done` rounds are done: its samples are the reference's.

    None for a reference that no policy version is.
    """
    match block:
        case InitialReferenceBlock():
            return 0
        case PreviousRoundReferenceBlock() | SamplerReferenceBlock():
            return rounds_done
        case EveryReferenceBlock():
            return rounds_done - rounds_done % block.n
        case EmaReferenceBlock() | ModelReferenceBlock() | NoReferenceBlock():
            return None
        case _:
            assert_never(block)
