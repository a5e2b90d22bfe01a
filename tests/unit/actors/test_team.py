"""Which policies engines can serve one after the other."""

from dataclasses import replace
from pathlib import Path

from actors.team import Served
from raylign.config.blocks import ModelBlock

BASE = Served("model", ModelBlock(), None, 0, adapted=True)
TRAINED = replace(BASE, checkpoint=Path("0001"), version=1)


def test_engines_serve_checkpoints_after_the_model_they_were_trained_from_and_never_before() -> None:
    assert TRAINED.may_follow(BASE) and replace(TRAINED, version=2).may_follow(TRAINED) and BASE.may_follow(BASE)
    assert not BASE.may_follow(TRAINED)
    for other in (
        replace(BASE, folder="another"),
        replace(BASE, model=ModelBlock(dtype="float32")),
        replace(BASE, adapted=False),
    ):
        assert not TRAINED.may_follow(other)
    assert (BASE.engine.name, replace(BASE, adapted=False).engine.name) == ("lora", "shm")
