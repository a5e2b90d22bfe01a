"""The folder in shared memory: gone with its run, and with the next one where nobody could clean up."""

from pathlib import Path

import pytest
from filelock import FileLock

from actors.weight_sync import folder as folders
from actors.weight_sync.folder import sweep, weight_folder
from tests.faults import record


def test_it_goes_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "shared_folder", lambda: tmp_path)
    with weight_folder("name") as folder:
        (folder / "model.safetensors").write_bytes(b"1")
        assert folder.parent == tmp_path and folder.name.startswith("raylign-name-")
        sweep(tmp_path)
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_its_janitor_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(pid: int, folder: Path) -> None:
        assert folder.is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "shared_folder", lambda: tmp_path)
    monkeypatch.setattr(folders, "clean_up_folder", interrupted)
    with pytest.raises(KeyboardInterrupt), weight_folder("name"):
        pytest.fail("never reached")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_the_next_run_sweeps_what_nobody_holds(tmp_path: Path) -> None:
    left, held, foreign = (tmp_path / name for name in ("raylign-left-1-a", "raylign-held-2-b", "other"))
    for folder in (left, held, foreign):
        folder.mkdir()
        (folder / ".lock").touch()
        (folder / "model.safetensors").write_bytes(b"1")
    with FileLock(held / ".lock"):
        sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "raylign-held-2-b"]
    record(
        "driver and janitor killed together", "a weight folder without a holder", lost="nothing: the next run sweeps"
    )
