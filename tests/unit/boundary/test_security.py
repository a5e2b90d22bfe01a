"""What comes from outside stays data: no pickle, no code of a model or data set, no path, no markup."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.boundary.secrets import REDACTED
from raylign.config import OnlineDpoConfig, dump_config, parse_config
from raylign.config.blocks import ModelBlock, PromptsBlock
from raylign.errors import ConfigError, ModelError, PromptError, RaylignError
from raylign.models import load_tokenizer, resolve_model
from raylign.models.load import load_policy
from raylign.prompts import PromptSet, load_prompts
from raylign.prompts.sources import read_source
from raylign.run.directory import continue_or_create
from raylign.run.files import inside
from raylign.scoring.process import child_environment
from raylign.tracking.facts import publishable, redacted
from tests.faults import record
from tests.unit.forbidden import AROUND_HTTP, HTTP_DOORS, forbidden
from tests.unit.tiny_policy import save_policy

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted(path for folder in ("platform", "actors", "recipes") for path in (ROOT / folder).rglob("*.py"))
PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
PATHS = ("../../etc/x", "/etc/passwd", "..", "a/b", "a\0b", "~", "C:\\x", "\n", "x" * 5000, "$(touch x)", "%2e%2e%2f")


class Leaves:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self._mark), "w")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that untrusted code makes when it runs."""
    return tmp_path / "mark"


def save_code(file: Path, mark: Path) -> None:
    file.write_text(f"open({str(mark)!r}, 'w').close()\nraise SystemExit('this code must not run')\n")


def edit_json(file: Path, **change: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_the_bait_works(mark: Path) -> None:
    pickle.loads(pickle.dumps(Leaves(mark))).close()
    assert mark.exists()


@pytest.mark.fault
def test_pickled_weights_are_refused_unread(tmp_path: Path, mark: Path) -> None:
    folder = save_policy(tmp_path / "policy")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Leaves(mark)}))
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin: pickled weights can run code .* safetensors"):
        resolve_model(str(folder))
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load_policy(str(folder), ModelBlock(path=str(folder)), seed=0)
    assert not mark.exists()
    record("pickled weights", "a model folder whose only weights are a pickle that runs code", lost="nothing: refused")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"])
def test_pickles_beside_safetensors_are_never_read(name: str, tmp_path: Path, mark: Path) -> None:
    folder = save_policy(tmp_path / "policy")
    (folder / name).write_bytes(pickle.dumps({"weight": Leaves(mark)}))
    load_policy(resolve_model(str(folder)), ModelBlock(path=str(folder)), seed=0)
    load_tokenizer(str(folder))
    assert not mark.exists()


def test_a_pickled_adapter_in_a_model_folder_is_never_read(tmp_path: Path, mark: Path) -> None:
    folder = save_policy(tmp_path / "policy")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"weight": Leaves(mark)}))
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        load_policy(resolve_model(str(folder)), ModelBlock(path=str(folder)), seed=0)
    assert not mark.exists()


@pytest.mark.fault
def test_code_that_ships_with_a_model_is_refused_unread(tmp_path: Path, mark: Path) -> None:
    folder = save_policy(tmp_path / "policy")
    save_code(folder / "modeling_own.py", mark)
    auto_map = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    edit_json(folder / "config.json", auto_map=auto_map, model_type="own")
    with pytest.raises(ModelError, match=r"read that code and set model\.trust_remote_code=true"):
        load_policy(resolve_model(str(folder)), ModelBlock(path=str(folder)), seed=0)
    assert not mark.exists()
    record("code in a model folder", "auto_map in config.json, trust_remote_code off", lost="nothing: refused unread")


def test_a_known_model_is_loaded_without_the_code_it_ships(tmp_path: Path, mark: Path) -> None:
    folder = save_policy(tmp_path / "policy")
    save_code(folder / "modeling_own.py", mark)
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Model"})
    (folder / "custom_generate").mkdir()
    save_code(folder / "custom_generate/generate.py", mark)
    load_policy(resolve_model(str(folder)), ModelBlock(path=str(folder)), seed=0)
    assert not mark.exists()


def test_code_that_ships_with_a_tokenizer_is_refused_unread(tmp_path: Path, mark: Path) -> None:
    folder = save_policy(tmp_path / "policy")
    save_code(folder / "own.py", mark)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")
    with pytest.raises(ModelError, match=r"read that code and set model\.trust_remote_code=true"):
        load_tokenizer(str(folder))
    assert not mark.exists()


def test_a_chat_template_cannot_leave_its_sandbox(tmp_path: Path, mark: Path) -> None:
    folder = save_policy(tmp_path / "policy")
    template = "{{ cycler.__init__.__globals__.os.system('touch MARK') }}".replace("MARK", str(mark))
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(PromptError, match="refused by the chat template .*is unsafe"):
        load(tmp_path, [{"prompt": "good"}, {"prompt": "bad"}], folder)
    assert not mark.exists()


@pytest.mark.fault
def test_data_sets_with_a_loading_script_are_refused_unread(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    save_code(folder / "scripted.py", mark)
    for source in (folder, folder / "scripted.py"):
        with pytest.raises(PromptError, match=r"not a folder made by|not a \.jsonl, \.json, \.parquet file"):
            read_source(PromptsBlock(source=str(source)))
    from_hub = datasets.get_dataset_split_names
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *part, **more: from_hub(str(folder)))
    with pytest.raises(PromptError, match="scripts are no longer supported.*code that ships with data is never run"):
        read_source(PromptsBlock(source="someone/scripted"))
    assert not mark.exists()
    record("code in a data set", "a hub data set and a folder with a loading script", lost="nothing: refused unread")


def test_a_parquet_file_cannot_carry_a_pickle(tmp_path: Path, mark: Path) -> None:
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Leaves(mark)),
    }
    schema = pa.schema([pa.field("prompt", pa.string(), metadata=metadata)])
    pq.write_table(pa.table([pa.array(["good", "bad"])], schema=schema), tmp_path / "p.parquet")
    assert len(read_source(PromptsBlock(source=str(tmp_path / "p.parquet"))).train.rows) == 2
    assert not mark.exists()


@pytest.mark.parametrize(
    ("snippet", "fault"),
    [
        ("import torch\ntorch.load(path)", "torch.load"),
        ("import torch as t\nt.load(path)", "torch.load"),
        ("from torch import load as read\nread(path)", "torch.load"),
        ("def f():\n    import pickle", "imports pickle"),
        ("from cloudpickle import dumps", "imports cloudpickle"),
        ("import marshal, shelve", "imports marshal"),
        ("from joblib.numpy_pickle import load", "imports joblib"),
        ("import yaml\nyaml.load(text)", "yaml.load without SafeLoader"),
        ("import yaml\nyaml.load(text, Loader=yaml.Loader)", "yaml.load without SafeLoader"),
        ("import yaml\nyaml.unsafe_load(text)", "yaml.unsafe_load"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("import subprocess\nsubprocess.run(text, shell=True)", "shell=True"),
        ("from os import system\nsystem(text)", "os.system"),
        ("load(path, trust_remote_code=True)", "trust_remote_code=True"),
        ("load(path, **{'trust_remote_code': True})", "trust_remote_code=True"),
        ("from tempfile import mktemp\nmktemp()", "tempfile.mktemp"),
        ("socket.bind(('0.0.0.0', 0))", "every network interface"),
        ("serve(host='::')", "every network interface"),
        ("requests.get(url, verify=False)", "verify=False"),
        ("import requests\nrequests.get(url)", "requests.get: goes around raylign.boundary.http"),
        ("from urllib.request import urlopen\nurlopen(url)", "goes around raylign.boundary.http"),
        ("import httpx as h\nh.AsyncClient()", "goes around raylign.boundary.http"),
        ("environ['VLLM_ALLOW_INSECURE_SERIALIZATION'] = '1'", "lets vLLM unpickle"),
    ],
)
def test_the_check_of_the_sources_can_fail(snippet: str, fault: str) -> None:
    assert any(fault in line for line in forbidden(snippet)), forbidden(snippet)


def test_the_check_of_the_sources_lets_the_safe_forms_through() -> None:
    safe = (
        "import yaml, torch\nfrom safetensors.torch import load\nload(data)\nyaml.load(text, Loader=yaml.SafeLoader)\n"
        "yaml.safe_load(text)\nmodel.eval()\nrun([program], shell=False)\n"
        "load(trust_remote_code=block.trust_remote_code)\n"
    )
    assert forbidden(safe) == []


def faults_of(path: Path) -> list[str]:
    is_door = str(path).endswith(HTTP_DOORS)
    return [fault for fault in forbidden(path.read_text()) if not (is_door and AROUND_HTTP in fault)]


def test_the_sources_have_nothing_forbidden() -> None:
    found = {str(path.relative_to(ROOT)): faults for path in SOURCES if (faults := faults_of(path))}
    assert len(SOURCES) > 100 and found == {}


SECRET = "hush-1234-hush"


@pytest.mark.parametrize(
    "uri",
    [
        f"http://me:{SECRET}@mlflow:5000",
        f"https://{SECRET}@mlflow",
        f"http://me:{SECRET}/x@mlflow",
        f"postgresql://me:{SECRET}@host/db",
        f"postgresql://host/db?user=me&password={SECRET}",
        f"https://mlflow/?access_token={SECRET}",
    ],
)
def test_addresses_with_credentials_are_refused_without_naming_them(uri: str) -> None:
    with pytest.raises(ConfigError, match="use MLFLOW_TRACKING_USERNAME/_PASSWORD") as caught:
        parse_config({}, [f"tracking.uri={uri}"])
    assert SECRET not in str(caught.value)


def test_an_unknown_key_does_not_show_its_value() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.password: unknown key") as caught:
        parse_config({"tracking": {"password": SECRET}})
    assert SECRET not in str(caught.value)


def test_other_addresses_stay_as_they_are() -> None:
    for uri in ("http://mlflow:5000/path", "sqlite:////data/me@home/mlflow.db", "postgresql://host/db?sslmode=require"):
        assert parse_config({}, [f"tracking.uri={uri}"]).tracking.uri == uri


def test_what_is_published_has_no_secrets_by_name_or_in_addresses() -> None:
    tree = {
        "judge": {"api_key": SECRET, "api_key_env": "JUDGE_KEY", "url": f"https://me:{SECRET}@host/v1"},
        "list": [{"token": SECRET}],
    }
    for published in (publishable(tree), redacted(tree)):
        assert SECRET not in json.dumps(published) and REDACTED in json.dumps(published)
        assert "JUDGE_KEY" in json.dumps(published)


def test_no_secret_reaches_the_scoring_process() -> None:
    names = {
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"),
        *("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "GOOGLE_APPLICATION_CREDENTIALS", "PGPASSFILE", "SMTP_PASS"),
    }
    addresses = {"DATABASE_URL": f"postgresql://me:{SECRET}@host/db", "HTTPS_PROXY": f"http://me:{SECRET}@proxy:3128"}
    environment = child_environment({**dict.fromkeys(names, SECRET), **addresses, "LANG": "C", "PATH": "/bin"}, ["/a"])
    assert environment.keys() == {"LANG", "PATH", "PYTHONPATH"}


@pytest.mark.parametrize("name", [*PATHS, "", ".", ".hidden", "-rf", "a b", "a\n", "x" * 129])
def test_a_run_name_is_one_plain_part_of_a_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.name: String should"):
        parse_config({"run": {"name": name, "dir": str(tmp_path)}})
    assert list(tmp_path.iterdir()) == []


def test_the_longest_run_name_can_be_written(tmp_path: Path) -> None:
    config = parse_config({"run": {"name": "x" * 128, "dir": str(tmp_path)}})
    assert continue_or_create(config).path == tmp_path / ("x" * 128)


@pytest.mark.parametrize("path", ["../x", "../../etc/passwd", "/etc/passwd", "rounds/../../x", "link/x"])
def test_artifacts_stay_inside_the_run_directory(path: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "link").symlink_to(tmp_path)
    with pytest.raises(RaylignError, match="is outside the run directory"):
        inside(run, path)


@pytest.mark.parametrize("source", [f"{'x' * 5000}", f"/{'x' * 5000}.jsonl", "a\0b", "../../etc/shadow\0.jsonl"])
def test_sources_that_are_no_path_are_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PromptError):
        read_source(PromptsBlock(source=source))
    with pytest.raises(ModelError):
        resolve_model(source)


def load(folder: Path, rows: list[dict[str, Any]], policy: Path) -> PromptSet:
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    block = PromptsBlock(source=str(folder / "rows.jsonl"), held_out=1)
    return load_prompts(block, load_tokenizer(str(policy)), 50, seed=0)


@pytest.mark.fault
def test_names_in_the_prompts_never_become_names_of_files(tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy")
    words = [f"{'good ' * (index // 2 + 1)}{'bad' if index % 2 else ''}" for index in range(len(PATHS))]
    rows = [
        {"prompt": word, "id": path, "prompt_id": path, "run": path, path: path}
        for word, path in zip(words, PATHS, strict=True)
    ]
    prompts = load(tmp_path, rows, policy)
    everything = [*prompts.train, *prompts.held_out]
    assert len(everything) == len(PATHS)
    assert all(prompt.id[0] in "ph" and prompt.id[1:].isdigit() and len(prompt.id) == 7 for prompt in everything)
    record("paths as ids", f"{len(PATHS)} path-like ids and columns in the prompts", lost="nothing: they stay data")


def test_a_config_survives_being_written_whatever_is_in_it(tmp_path: Path) -> None:
    odd = '!!python/object/apply:os.system ["touch x"]\n---\n\x1b[2J'
    config: OnlineDpoConfig = parse_config({"prompts": {"system": odd}, "run": {"dir": str(tmp_path)}})
    directory = continue_or_create(config)
    assert directory.config() == config and "\x1b" not in dump_config(config)


def test_a_recipe_cannot_make_objects(tmp_path: Path, mark: Path) -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_config({}, [f"run.name=!!python/object/apply:os.system ['touch {mark}']"])
    assert not mark.exists() and os.listdir(tmp_path) == []
