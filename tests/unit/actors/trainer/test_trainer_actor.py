"""What a trainer rank imports before it begins."""

import sys
from types import ModuleType

import pytest
import torch

from actors.trainer.actor import import_peft


@pytest.mark.parametrize("broken", [False, True])
def test_bitsandbytes_is_imported_without_a_compiler(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    """Functions that it decorates stay as they are; others are compiled as before, also after an import that failed."""
    before, seen = torch.compile, []

    def is_bnb_4bit_available() -> bool:
        seen.append(torch.compile(len, dynamic=False))
        if broken:
            raise OSError("no such library")
        return True

    utils = ModuleType("peft.import_utils")
    monkeypatch.setattr(utils, "is_bnb_4bit_available", is_bnb_4bit_available, raising=False)
    monkeypatch.setitem(sys.modules, "peft.import_utils", utils)
    if broken:
        with pytest.raises(OSError, match="no such library"):
            import_peft()
    else:
        import_peft()
    assert seen == [len] and torch.compile is before
