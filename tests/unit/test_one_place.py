"""Each variety has one place: a loss, a way of pairing or a scorer more touches two files, one of them the config's."""

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Patch:
    """Text before which a line goes, by file and new text; whole new files; and code that uses what was added."""

    run: str
    edits: list[tuple[str, str, str]]
    files: dict[str, str] = field(default_factory=dict)

    @property
    def touched(self) -> set[str]:
        return {name for name, _, _ in self.edits} | self.files.keys()


LOSS = Patch(
    edits=[
        (
            "platform/raylign/config/losses/pairwise.py",
            "PairwiseLoss = (\n    SigmoidLossBlock",
            '''class SquaredLossBlock(WeightedLossBlock):
    """(delta - 1)^2."""

    loss_type: Literal["squared"] = "squared"


PairwiseLoss = (
    SquaredLossBlock
    | SigmoidLossBlock''',
        ),
        (
            "platform/raylign/losses/pairwise.py",
            "    SppoHardLossBlock,\n)",
            "    SppoHardLossBlock,\n    SquaredLossBlock,\n)",
        ),
        (
            "platform/raylign/losses/pairwise.py",
            "LOSSES = table(\n",
            "LOSSES = table(\n    loss_of(SquaredLossBlock, lambda c, b, state: (_plain_delta(c, b) - 1) ** 2),\n",
        ),
    ],
    run="""
import torch
from raylign.config import parse_config
from raylign.losses import LossState
from tests.unit.losses.sums import preference_loss
from tests.unit.losses.test_losses import random_candidates
block = parse_config({"loss": {"loss_type": "squared", "beta": 0.5}}).loss
logps = random_candidates(4, 2)
h = logps.policy - logps.reference
assert torch.allclose(preference_loss(logps, block, LossState()).losses, (0.5 * (h[:, 0] - h[:, 1]) - 1) ** 2)
""",
)
PAIRING = Patch(
    edits=[
        (
            "platform/raylign/config/pairing.py",
            "PairingBlock = (\n    BestWorstPairingBlock",
            '''class FirstLastPairingBlock(PairingBase):
    """The first sample against the last."""

    type: Literal["first_last"] = "first_last"


PairingBlock = (
    FirstLastPairingBlock
    | BestWorstPairingBlock''',
        ),
        (
            "platform/raylign/pairing/strategies.py",
            "    LengthMatchedPairingBlock,\n    PairingBlock",
            "    FirstLastPairingBlock,\n    LengthMatchedPairingBlock,\n    PairingBlock",
        ),
        (
            "platform/raylign/pairing/strategies.py",
            "        case BestWorstPairingBlock():",
            "        case FirstLastPairingBlock():\n            return [(found[0], found[-1])]\n"
            "        case BestWorstPairingBlock():",
        ),
    ],
    run="""
from raylign.config import parse_config
from raylign.pairing import build_preferences
from raylign.records import Candidate, Prompt, Score
prompt = Prompt("p", (), (1,))
candidates = [Candidate("p", i, (i + 1,), (-1.0,), f"text {i}", "stop", 0, 0) for i in range(3)]
block = parse_config({"pairing": {"type": "first_last"}}).pairing
found = build_preferences([prompt], candidates, [Score(1.0), Score(3.0), Score(0.0)], block, 0).preferences
assert [[c.index for c in p.candidates] for p in found] == [[0, 2]]
""",
)
SCORER = Patch(
    edits=[
        (
            "platform/raylign/config/scoring/blocks.py",
            "LeafBlock = (\n    FunctionScoringBlock",
            '''class LengthScoringBlock(LeafScoringBlock):
    """Characters of the completion."""

    module: ClassVar[str] = "length"
    type: Literal["length"] = "length"
    weight: float = 1.0
    """Of a character."""
    batch_size: PositiveInt = 64
    max_unscored: Fraction = 0.2
    cache: CacheOption = "run"

    @property
    def title(self) -> str:
        return "length"


LeafBlock = (
    LengthScoringBlock
    | FunctionScoringBlock''',
        ),
    ],
    files={
        "platform/raylign/scoring/length.py": '''"""Scores by length."""

from raylign.records import Score
from raylign.scoring.kind import Kind


class LengthScorer:
    def __init__(self, block):
        self.weight = block.weight

    def score(self, items, allowed=None):
        return [Score(self.weight * len(item.completion)) for item in items]


KIND = Kind(
    lambda block, near: near.kept(block, LengthScorer(block)),
    lambda block, load: (f"{block.weight:g} a character",),
    longest_s=lambda block, batch: 1.0,
    code=("length.py",),
)
'''
    },
    run="""
import sys
from pathlib import Path
from raylign.config import parse_config
from raylign.records import Prompt
from raylign.scoring.base import ScoringItem
from raylign.scoring.kind import batches, longest_s
from raylign.scoring.load import describe_scorer
from raylign.scoring.load import load_scorer
inner = {"long": {"type": "length"}, "short": {"type": "length", "weight": -0.5}}
block = parse_config({"scoring": {"type": "weighted", "scorers": inner, "weights": {"long": 1, "short": 1}}}).scoring
items = [ScoringItem(Prompt("p", (), (1,)), text) for text in ("ab", "abcd")]
scorer = load_scorer(block, Path(sys.argv[1]) / "scores.sqlite")
assert [score.value for score in scorer.score(items)] == [1.0, 2.0] == [s.value for s in scorer.score(items)]
assert scorer.take_usage()["long"].cache_hits == 2
assert describe_scorer(block)[1:3] == ("long: length", "  1 a character")
assert longest_s(items, block) == 2.0 and len(batches(items, block)) == 1
""",
)
TRANSPORT = Patch(
    edits=[
        (
            "platform/raylign/config/blocks.py",
            'transport: Literal["auto", "lora", "shm", "nccl", "ipc"]',
            'transport: Literal["auto", "lora", "shm", "nccl", "ipc", "disk"]',
        ),
        (
            "actors/weight_sync/transports.py",
            'Name = Literal["lora", "shm", "nccl", "ipc"]',
            'Name = Literal["lora", "shm", "nccl", "ipc", "disk"]',
        ),
        (
            "actors/weight_sync/transports.py",
            "@dataclass(frozen=True, slots=True)\nclass DeviceTransport:",
            '''@dataclass(frozen=True, slots=True)
class DiskTransport:
    """Merged weights through a folder on a disk that all nodes see."""

    engine: ClassVar[EngineEnd] = EngineEnd("disk", BACKEND, opens_itself=True)
    needed_bytes: ClassVar[int] = 0
    folder: Path

    def push(self, trainers, generators, version, timeout_s):
        file = NodePath(str(self.folder / "model.safetensors"))
        trainers.save_weights(file.path)
        generators.call("loading", timeout_s, Generator.take_weights, file, version)
        return Path(file.path).stat().st_size


@dataclass(frozen=True, slots=True)
class DeviceTransport:''',
        ),
        (
            "actors/weight_sync/transports.py",
            '        case "nccl":',
            '        case "disk":\n            return DiskTransport(config.run.dir)\n        case "nccl":',
        ),
    ],
    run="""
import sys
from pathlib import Path
from actors.placement import PlacementPlan
from actors.weight_sync.folder import OneNode
from actors.weight_sync.publish import Canary
from actors.weight_sync.publish import WeightPublisher
from actors.weight_sync.transports import weight_transport
from raylign.boundary.imports import lean_imports
from raylign.config import parse_config
with lean_imports():
    from tests.fakes import FakeEngine, FakeGenerators, FakeRank, fake_trainers
config = parse_config({}, ["generators.weight_sync.transport=disk", f"run.dir={sys.argv[1]}"])
plan = PlacementPlan("cpu", (), (), ())
transport = weight_transport(config, "unused", plan, OneNode(Path("unused")))
rank, engine = FakeRank([], config), FakeEngine([])
rank.version = 1
trainers, canary = fake_trainers(rank, config), Canary(((1, 2),), 0.1)
publisher = WeightPublisher(trainers, FakeGenerators([engine]), transport, canary, 1.0)
publisher.publish(1)
assert (engine.weights, engine.label_now, transport.engine.name) == (1, 1, "disk")
""",
)
CASES = {"loss": LOSS, "pairing": PAIRING, "scorer": SCORER, "transport": TRANSPORT}


@pytest.mark.parametrize("patch", CASES.values(), ids=CASES.keys())
def test_one_more_touches_two_files(patch: Patch, tmp_path: Path) -> None:
    for folder in ("platform", "actors", "recipes", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("cases"))
    for name, before, after in patch.edits:
        text = (tmp_path / name).read_text()
        assert text.count(before) == 1, f"{before!r} in {name}"
        (tmp_path / name).write_text(text.replace(before, after))
    for name, text in patch.files.items():
        (tmp_path / name).write_text(text)
    assert len(patch.touched) == 2
    done = subprocess.run(
        [sys.executable, "-P", "-c", patch.run, str(tmp_path)],
        env={"PYTHONPATH": f"{tmp_path}/platform:{tmp_path}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
