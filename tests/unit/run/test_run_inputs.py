"""A run goes on only with what it began with: what was edited since is named, and refused unless it is meant."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.scorer.actor import ScorerWorker
from raylign.config import OfflineDpoConfig, load_config
from raylign.config.scoring import FunctionScoringBlock
from raylign.errors import ConfigError, RecordError, ScorerError
from raylign.records import Prompt
from raylign.run.directory import open_run
from raylign.run.inputs import INPUTS_NAME, accept
from raylign.run.sources import KeptSources, kept_code, module_sources
from raylign.scoring.base import ScoringItem
from raylign.tracking.journal import JOURNAL_NAME, Journal
from raylign.tracking.tracker import Tracker
from recipes.commands.resume import resumed_config
from recipes.opening import find_models, find_rows, inputs_of, online_run
from tests.fakes import NoFeed
from tests.faults import record
from tests.unit.tiny_policy import save_recipe

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
LOOP = "from recipes.online_dpo import train\n"


class Reached(Exception):
    """All checks are passed."""


@contextmanager
def some_cpus() -> Iterator[Mapping[str, float]]:
    yield {"CPU": 8.0}


@contextmanager
def no_team(*arguments: object, **options: object) -> Iterator[None]:
    raise Reached
    yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, its prompts and model, a scorer in two modules, and a loop of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("actors.cluster.cluster", some_cpus)
    monkeypatch.setattr("actors.team.team", no_team)
    monkeypatch.setattr("recipes.opening.describe_scorer", lambda block: ())
    monkeypatch.setattr("actors.cluster.log_folder", lambda: tmp_path)
    monkeypatch.setattr("recipes.opening.starting", lambda directory, logs: "starting")
    monkeypatch.setattr(
        "recipes.opening.open_tracker", lambda path, block: Tracker(Journal(path / JOURNAL_NAME), NoFeed())
    )
    save_recipe(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from parts import base\ndef score(prompts, completions):\n    return base.all_of(completions)\n"
    )
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/base.py").write_text("def all_of(completions):\n    return [1.0 for _ in completions]\n")
    (tmp_path / "template.jinja").write_text(
        TEMPLATE.replace("%}{{", "%}{{ '' }}{{") + "{% if add_generation_prompt %}say {% endif %}"
    )
    (tmp_path / "loop.py").write_text(LOOP)
    return tmp_path


def start(project: Path, *settings: str) -> None:
    """Begin the run, or go on with it, up to where its actors would start."""
    options = ["scoring.function=mine:score", f"model.chat_template={project}/template.jinja", *settings]
    with pytest.raises(Reached), online_run(load_config(project / "tiny.yaml", options), f"{project}/loop.py"):
        raise AssertionError("a team without actors")


def refusal(project: Path, *settings: str) -> ConfigError:
    options = ["scoring.function=mine:score", f"model.chat_template={project}/template.jinja", *settings]
    with (
        pytest.raises(ConfigError, match="began with other inputs than there are now; what has changed:") as error,
        online_run(load_config(project / "tiny.yaml", options), f"{project}/loop.py"),
    ):
        raise AssertionError("started")
    return error.value


def replace(name: str, before: str, after: str) -> Callable[[Path], None]:
    def edit(project: Path) -> None:
        text = (project / name).read_text()
        assert before in text
        (project / name).write_text(text.replace(before, after, 1))

    return edit


def append(name: str, line: str) -> Callable[[Path], object]:
    return lambda project: (project / name).write_text((project / name).read_text() + line)


def flip(project: Path) -> None:
    weights = project / "policy/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


EDITS: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "a prompt": (replace("prompts.jsonl", "good good good", "good good two"), "prompts.source", True),
    "a column that scorers see": (replace("prompts.jsonl", '"good"}', '"good", "answer": 4}'), "prompts.source", True),
    "one prompt more": (append("prompts.jsonl", '{"prompt": "one two three"}\n'), "prompts.source", True),
    "a bit of the weights": (flip, "model.path", True),
    "the model's tokenizer": (append("policy/tokenizer_config.json", " "), "model.path", True),
    "the chat template": (replace("template.jinja", "{{ '' }}", ""), "model.chat_template", True),
    "the scorer": (replace("mine.py", "return base", "return  base"), "scoring.function=mine:score", False),
    "what the scorer imports": (replace("parts/base.py", "1.0", "2.0"), "scoring.function=mine:score", False),
    "the loop": (append("loop.py", "# other\n"), "recipe", False),
}


@pytest.mark.fault
@pytest.mark.parametrize("edited", EDITS)
def test_what_was_edited_between_two_starts_is_named_and_refused(edited: str, project: Path) -> None:
    edit, name, fixed = EDITS[edited]
    start(project)
    start(project)
    run = open_run(project / "runs/tiny")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    edit(project)
    error = refusal(project)
    named = [line.strip().partition(": ")[0] for line in str(error).splitlines()[1:]]
    assert named == [name]
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    if fixed:
        assert "restore it, or begin another run (run.name=...)" in error.cure and "--accept" not in error.cure
        with pytest.raises(ConfigError, match="what has changed"):
            resumed_config(run.path, (), (name,))
    else:
        assert error.cure == f"restore it, or if you mean it: raylign resume {run.path} --accept {name}"
        resumed_config(run.path, (), (name,))
        start(project)
        start(project)
    record(
        "edited while a run was stopped",
        edited,
        lost="nothing: refused before anything starts, with the name and the way to mean it",
    )


def test_other_settings_take_other_inputs(project: Path) -> None:
    start(project)
    (project / "second.py").write_text("def score(prompts, completions): ...\n")
    resumed_config(project / "runs/tiny", ["scoring.function=second:score"])
    start(project, "scoring.function=second:score")
    inputs = json.loads((project / "runs/tiny" / INPUTS_NAME).read_text())["inputs"]
    assert [name for name in inputs if name.startswith("scoring")] == [
        "scoring.function=mine:score",
        "scoring.function=second:score",
    ]


def test_rows_of_a_run_of_an_earlier_version_are_known_by_its_journal(project: Path) -> None:
    start(project)
    (project / "runs/tiny" / INPUTS_NAME).unlink()
    start(project)
    (project / "runs/tiny" / INPUTS_NAME).unlink()
    EDITS["a prompt"][0](project)
    assert "prompts.source" in str(refusal(project))


def test_inputs_that_cannot_be_accepted_are_named(project: Path) -> None:
    start(project)
    run = project / "runs/tiny"
    with pytest.raises(ConfigError, match="it has no input 'scorer'; inputs: model.path, prompts.source, model.chat"):
        accept(run, ["scorer"])
    (run / INPUTS_NAME).write_text('{"inputs": {"model.path": 3}}')
    with pytest.raises(RecordError, match=r"inputs.json cannot be read: inputs.model.path: "):
        accept(run, ["recipe"])
    (run / INPUTS_NAME).unlink()
    with pytest.raises(ConfigError, match="none are recorded"):
        accept(run, ["recipe"])


def test_the_rows_of_a_data_set_are_an_input(tmp_path: Path) -> None:
    save_recipe(tmp_path)
    rows = [
        {"prompt": f"say {word}", "chosen": "good film", "rejected": "three"}
        for word in ("one", "two", "three", "film")
    ]
    (tmp_path / "offline.yaml").write_text(f"recipe: offline_dpo\ndata: {{source: {tmp_path}/pairs.jsonl}}\n")
    settings = [f"model.path={tmp_path}/policy", "data.max_length=32", "data.held_out=1", f"run.dir={tmp_path}/runs"]
    config = load_config(tmp_path / "offline.yaml", settings, kind=OfflineDpoConfig)

    def inputs() -> dict[str, str]:
        (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        models = find_models(config)
        found = inputs_of(config, find_rows(config, models), models, recipe=None)
        return {name: one.sha256 for name, one in found.items()}

    first = inputs()
    rows[2]["rejected"] = "two"
    second = inputs()
    assert first.keys() == {"model.path", "data.source"} and first["model.path"] == second["model.path"]
    assert first["data.source"] != second["data.source"]


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a package and modules that end the process which imports them."""
    files = {
        "top.py": "import json, near\nfrom pkg.inner import leaf as other\ndef f():\n    import late\n",
        "near.py": "import top, numpy\n",
        "late.py": "from .. import nothing\n",
        "pkg/__init__.py": "",
        "pkg/inner/__init__.py": "from . import leaf\nfrom ..sibling import x\n",
        "pkg/inner/leaf.py": "",
        "pkg/sibling.py": "from raylign import errors\n",
        "pkg/unrelated.py": "",
        "broken.py": "def f(:\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_sources_are_a_module_and_what_it_imports_of_its_project(code: Path) -> None:
    found = module_sources("top:f")
    assert [file.name for file in found.files][0] == "top.py" and not found.is_installed
    assert sorted(file.name for file in found.files) == [
        "late.py",
        "near.py",
        "pkg/__init__.py",
        "pkg/inner/__init__.py",
        "pkg/inner/leaf.py",
        "pkg/sibling.py",
        "top.py",
    ]
    assert [file.name for file in module_sources("pkg.inner.leaf:f").files][0] == "pkg/inner/leaf.py"
    assert [file.name for file in module_sources("broken:f").files] == ["broken.py"]
    assert module_sources("absent:f").files == () and module_sources("absent:f").digest == ""


def test_an_installed_module_is_known_by_its_file_alone(tmp_path: Path) -> None:
    for spec in ("numpy.linalg:norm", "raylign.scoring.vader:compound"):
        found = module_sources(spec)
        assert found.is_installed and len(found.files) == 1, spec
        assert found.kept(tmp_path).make_importable(spec) and list(tmp_path.iterdir()) == []
        assert not KeptSources("", "0" * 64).make_importable(spec)


def test_the_digest_knows_every_file(code: Path) -> None:
    before = module_sources("top:f").digest
    (code / "pkg/unrelated.py").write_text("changed\n")
    assert module_sources("top:f").digest == before
    (code / "pkg/sibling.py").write_text("changed = 1\n")
    assert module_sources("top:f").digest != before


def values(scorer: Any) -> list[float | None]:
    prompt = Prompt("p", ({"role": "user", "content": "say"},), (1,))
    return [score.value for score in scorer.score([ScoringItem(prompt, "good")], 0).scores]


@pytest.mark.fault
@pytest.mark.parametrize("changed", ["edited", "absent", "as it was"])
def test_actors_run_the_code_that_the_run_began_with(
    changed: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node that has other code, or none: what the driver found goes there with the run directory."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    block = FunctionScoringBlock(function="mine:score", cache=None)
    kept = kept_code([block.function], project / "runs/tiny/code")
    if changed == "edited":
        replace("parts/base.py", "1.0", "2.0")(project)
    elif changed == "absent":
        (project / "elsewhere").mkdir()
        monkeypatch.chdir(project / "elsewhere")
    scorer = ScorerWorker(block, str(project / "scores"), str(project / "stacks"), "scorer-0", code=kept)
    try:
        assert values(scorer) == [1.0]
        assert (kept["mine:score"].folder in sys.path) == (changed != "as it was")
    finally:
        scorer._scorer.close()
    record(
        "a node with other code for a scorer",
        changed,
        lost="nothing: the code that the run began with is run",
    )


def test_a_node_that_cannot_get_the_code_says_so(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    block = FunctionScoringBlock(function="mine:score")
    kept = kept_code([block.function], project / "runs/tiny/code")
    (Path(kept["mine:score"].folder) / "mine.py").write_text("def score(prompts, completions): ...\n")
    replace("mine.py", "return base", "return  base")(project)
    with pytest.raises(ScorerError, match=r"mine:score: .* has other code for it than the run began with"):
        ScorerWorker(block, str(project / "scores"), str(project / "stacks"), "scorer-0", code=kept)
    replace("mine.py", "return  base", "return base")(project)
    sys.path.remove(kept["mine:score"].folder)
    assert kept_code([block.function], project / "runs/tiny/code") == kept
    assert "from parts" in (Path(kept["mine:score"].folder) / "mine.py").read_text()
