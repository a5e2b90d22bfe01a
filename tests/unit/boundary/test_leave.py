"""No code of others without leave: none of a model's, none of a recipe's, whatever answers y at the terminal."""

import ast
import io
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM, PreTrainedModel

from raylign.config.blocks import LoraBlock, ModelBlock
from raylign.errors import ModelError, ScorerError
from raylign.export.policy import export_model
from raylign.export.reward_model import export_reward_model
from raylign.models import load_tokenizer
from raylign.models.load import load_policy, require_fit
from raylign.models.reward_model import HEAD_WEIGHT, load_reward_model
from raylign.scoring.locate import locate_function
from tests.faults import record
from tests.unit.boundary.test_security import edit_json, save_code
from tests.unit.export.test_export import FACTS
from tests.unit.export.test_export_reward import CARD
from tests.unit.forbidden import opened_elsewhere
from tests.unit.tiny_policy import save_policy, save_recipe

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted(path for folder in ("platform", "actors", "recipes") for path in (ROOT / folder).rglob("*.py"))
OPENERS = tuple(ROOT / "platform/raylign/models" / name for name in ("open.py", "load.py"))
OWN = """
from transformers.modeling_utils import PreTrainedModel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

open(MARK, "w").close()


class Config(LlamaConfig):
    model_type = "own"


class Model(LlamaForCausalLM):
    config_class = Config


class Classifier(LlamaForSequenceClassification):
    config_class = Config
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def own(tmp_path: Path, mark: Path) -> Path:
    """A policy whose config.json asks for the Python file beside it."""
    folder = save_policy(tmp_path / "own")
    (folder / "modeling_own.py").write_text(OWN.replace("MARK", repr(str(mark))))
    auto_map = {
        "AutoConfig": "modeling_own.Config",
        "AutoModelForCausalLM": "modeling_own.Model",
        "AutoModelForSequenceClassification": "modeling_own.Classifier",
    }
    edit_json(folder / "config.json", auto_map=auto_map, model_type="own", architectures=["Model"])
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    plain = save_policy(tmp_path / "plain")
    model = LlamaForCausalLM.from_pretrained(plain)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).save_pretrained(
        str(tmp_path / "adapter")
    )
    return tmp_path / "adapter"


def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something answers y to whatever is asked."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))


@pytest.mark.fault
def test_export_runs_no_code_of_the_model_whatever_answers(
    own: Path, adapter: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch)
    leave = r"read that code and set model\.trust_remote_code=true"
    with pytest.raises(ModelError, match=leave):
        export_model(adapter, str(own), tmp_path / "out", merge=True, card=FACTS)
    full = tmp_path / "full"
    full.mkdir()
    shutil.copyfile(own / "model.safetensors", full / "model.safetensors")
    with pytest.raises(ModelError, match=leave):
        export_model(full, str(own), tmp_path / "out", merge=False, card=FACTS)
    with pytest.raises(ModelError, match=leave):
        export_reward_model(adapter, str(own), tmp_path / "out", CARD)
    assert not mark.exists() and not (tmp_path / "out").exists()
    record(
        "code in the base model of an export", "auto_map, and a terminal that answers y", lost="nothing: refused unread"
    )


def test_with_leave_export_takes_the_code_along(own: Path, adapter: Path, mark: Path, tmp_path: Path) -> None:
    to = export_model(adapter, str(own), tmp_path / "out", merge=True, card=FACTS, trust_remote_code=True)
    assert mark.exists() and (to / "modeling_own.py").is_file()
    found = AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True)
    assert type(found).__name__ == "Model" and load_file(to / "model.safetensors")


@pytest.mark.parametrize(("trust", "runs"), [(False, False), (True, True)])
def test_the_block_decides_for_policies(own: Path, mark: Path, trust: bool, runs: bool) -> None:
    block = ModelBlock(path=str(own), trust_remote_code=trust, lora=LoraBlock(r=2))
    if runs:
        load_policy(str(own), block, seed=0)
        load_tokenizer(str(own), trust)
    else:
        with pytest.raises(ModelError, match="trust_remote_code=true"):
            load_policy(str(own), block, seed=0)
    assert mark.exists() == runs


def test_a_config_cannot_name_compiled_code_of_others(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "policy")
    edit_json(folder / "config.json", attn_implementation="somebody/kernel")
    with pytest.raises(ModelError, match=r"computes with code from somebody/kernel; .*trust_remote_code"):
        load_policy(str(folder), ModelBlock(), seed=0)


@pytest.mark.parametrize(
    ("snippet", "count"),
    [
        ("from transformers import AutoConfig\nAutoConfig.from_pretrained(f)", 1),
        ("import transformers as t\nt.AutoModel.from_config(c)", 1),
        ("kind.from_pretrained(f)", 1),
        ("getattr(kind, 'from_pretrained')(f)", 1),
        ("from peft import PeftModel as P\nload = P.from_pretrained\nload(m, f)", 1),
        ("model.save_pretrained(f)\nenvironment.from_string(text)", 0),
    ],
)
def test_the_check_of_the_sources_can_fail(snippet: str, count: int) -> None:
    assert len(opened_elsewhere(ast.parse(snippet))) == count


def test_two_modules_open_models_tokenizers_and_configs() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in SOURCES
        if path not in OPENERS and (lines := opened_elsewhere(ast.parse(path.read_text())))
    }
    assert len(SOURCES) > 100 and found == {}
    assert [len(opened_elsewhere(ast.parse(path.read_text()))) for path in OPENERS] == [2, 3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_policy(tmp_path / "policy")


@pytest.mark.fault
@pytest.mark.parametrize("how", ["loaded", "looked at"])
def test_weights_that_config_json_has_no_place_for_are_refused(folder: Path, how: str) -> None:
    edit_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(
        ModelError, match=r"config\.json has no place for 9 weights of the files, first model\.layers\.1"
    ):
        if how == "loaded":
            load_policy(str(folder), ModelBlock(), seed=0)
        else:
            require_fit(str(folder), False)
    record("config.json of another model", f"num_hidden_layers: 1 of 2, {how}", lost="nothing: refused")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_hidden_layers": 3}, "9 weights are not in the files, first model.layers.2"),
        ({"intermediate_size": 10}, "cannot be loaded|another shape"),
        ({"tie_word_embeddings": False}, "1 weights are not in the files, first lm_head.weight"),
        ({"hidden_size": "x"}, "config.json cannot be used|cannot be loaded"),
        ({"model_type": ["llama"]}, "config.json cannot be used"),
        ({"rope_scaling": 7}, "config.json cannot be used|cannot be loaded|positions"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_the_headers_alone(
    folder: Path, change: dict[str, object], complaint: str
) -> None:
    edit_json(folder / "config.json", **change)
    with pytest.raises(ModelError, match=complaint):
        require_fit(str(folder), False)
        load_policy(str(folder), ModelBlock(), seed=0)


def test_what_fits_is_taken(folder: Path) -> None:
    require_fit(str(folder), False)
    require_fit(str(folder), False, AutoModelForSequenceClassification, heads=(HEAD_WEIGHT,))
    weights = load_file(folder / "model.safetensors")
    # Old checkpoints have this buffer, which transformers declares without meaning.
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    require_fit(str(folder), False)
    load_policy(str(folder), ModelBlock(), seed=0)


def test_a_reward_model_makes_its_head_and_leaves_that_of_the_policy(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", tie_word_embeddings=False)
    model = load_reward_model(str(folder), ModelBlock(), 0, lambda parameters: nullcontext())
    assert isinstance(model, PreTrainedModel) and model.get_parameter(HEAD_WEIGHT).shape == (1, 8)
    edit_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(ModelError, match="no place for 9 weights"):
        load_reward_model(str(folder), ModelBlock(), 0, lambda parameters: nullcontext())


def test_a_tokenizer_that_is_none_is_refused(folder: Path) -> None:
    for content in ("{}", "[]", '{"version": "1.0", "model": {"type": "Bad"}}', "\0"):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(ModelError, match="no tokenizer can be loaded"):
            load_tokenizer(str(folder))


@pytest.fixture
def project(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose modules leave a mark when they are imported."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "tools").mkdir(parents=True)
    elsewhere.mkdir()
    save_code(project / "tools/__init__.py", mark)
    save_code(project / "mine.py", mark)
    with (project / "mine.py").open("a") as file:
        file.write("from tools.deep import other as renamed\nVALUE = 3\nif True:\n    def score(p, c): ...\n")
    (project / "tools/deep.py").write_text("\n\nasync def other(p, c): ...\n")
    (project / "starred.py").write_text("from tools.deep import *\n")
    (project / "broken.py").write_text("def score(:\n")
    (project / "taken.py").write_text("from foreign import score\n")
    save_code(elsewhere / "foreign.py", mark)
    monkeypatch.syspath_prepend(str(elsewhere))
    monkeypatch.chdir(project)
    return project


@pytest.mark.fault
def test_a_plan_finds_a_function_without_running_its_module(project: Path, mark: Path) -> None:
    found = locate_function("mine:score")
    assert (found.file, found.line) == (project / "mine.py", 6)
    assert (locate_function("mine:renamed").file, locate_function("mine:renamed").line) == (
        project / "tools/deep.py",
        3,
    )
    assert locate_function("starred:anything").line == 1
    assert not mark.exists()
    record(
        "a recipe of others is planned", "a scoring function whose module leaves a mark", lost="nothing: located unread"
    )


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("mine:scor", "module 'mine' has no 'scor'; did you mean 'score'?"),
        ("mine:VALUE", "'VALUE' is a int, not a function; correct the name"),
        ("mime:score", "no module 'mime' on PYTHONPATH or in the working directory; did you mean 'mine'?"),
        ("tools.dep:other", "no module 'tools.dep' .*; did you mean 'tools.deep'?"),
        ("mine.inner:x", "no module 'mine.inner'"),
        ("broken:score", "broken.py is no Python that can be read"),
        ("foreign:score", "foreign.py is outside the project"),
        ("taken:score", "foreign.py is outside the project"),
        ("json.loads", "not of the form module:function; give it so"),
        ("m" * 400 + ":x", "longer than 300 characters; correct the name"),
        ("sys:exit", "no source file"),
    ],
)
def test_what_a_run_would_refuse_is_refused_unread(project: Path, mark: Path, spec: str, complaint: str) -> None:
    with pytest.raises(ScorerError, match=complaint.replace("?", r"\?")):
        locate_function(spec)
    assert not mark.exists()


def test_functions_of_installed_packages_are_found() -> None:
    assert locate_function("raylign.scoring.vader:compound").line > 1
    assert locate_function("yaml:safe_load").file.parent.name == "yaml"


def test_a_command_plans_a_model_with_code_of_its_own(own: Path, mark: Path, tmp_path: Path) -> None:
    """The command does without torch, but a file of a model may hold its config and what computes with it."""
    recipe = save_recipe(tmp_path)
    command = [str(Path(sys.executable).with_name("raylign")), "plan", str(recipe)]
    command += [f"model.path={own}", "scoring.function=raylign.scoring.vader:compound"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "set model.trust_remote_code=true" in refused.stderr and not mark.exists()
    planned = subprocess.run([*command, "model.trust_remote_code=true"], capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stderr
    assert "1,128 parameters" in planned.stdout and mark.exists()
