"""Export of adapters, merged and full models, with a tiny Llama."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from raylign.config import parse_config
from raylign.config.guard import RaiseRule
from raylign.errors import ModelError
from raylign.evaluation.guard import Decision
from raylign.export.card import Method, PolicyFacts, card_text, framework_versions
from raylign.export.policy import export_model
from raylign.records import Evaluation, RoundReport
from raylign.run.directory import RunDirectory
from recipes.commands.export import card_facts

EVALUATION = Evaluation(0.5, 0.4, 0.6, 2.0, 40.0, 0.8, 0.75, 32, 1)
FACTS = PolicyFacts(
    name="tiny-dpo",
    base_model="someone/tiny",
    dataset="embedded:review-topics",
    method=Method(
        "online DPO",
        "online DPO, loss `sigmoid`, beta 0.1",
        ("dpo", "online-dpo"),
        {"Prompts": "embedded:review-topics", "Scorer": "raylign.scoring.vader:compound"},
    ),
    rounds=3,
    evaluation=EVALUATION,
    confidence=0.95,
    versions={"torch": "2.13.0"},
    license="apache-2.0",
)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
TOKENS = torch.arange(12).reshape(2, 6)


def save_base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    return folder


def save_adapter(folder: Path, base: Path) -> Path:
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapted(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(load(base), adapter)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".partial")]


def test_merged_logits_equal_those_of_the_adapter(tmp_path: Path, base: Path, adapter: Path) -> None:
    to = export_model(adapter, str(base), tmp_path / "deep" / "out", merge=True, card=FACTS)
    expected = logits(adapted(base, adapter))
    torch.testing.assert_close(logits(load(to)), expected, atol=1e-4, rtol=0)
    assert (logits(load(base)) - expected).abs().max() > 0.1, "the adapter must matter for this test to mean anything"
    assert sorted(load_file(to / "model.safetensors")) == sorted(load_file(base / "model.safetensors"))
    assert not (to / "adapter_config.json").exists()
    assert leftovers(to.parent) == []


def test_merging_rounds_once_to_the_dtype_of_the_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base)
    to = export_model(adapter, str(base), tmp_path / "out", merge=True, card=FACTS)
    stored = load_file(to / "model.safetensors")
    exact = adapted(base, adapter).merge_and_unload().state_dict()
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((to / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, exact[name].to(torch.bfloat16), atol=0, rtol=0)
        torch.testing.assert_close(tensor.float(), exact[name], atol=1e-30, rtol=2.0**-8)


def test_tokenizer_template_generation_config_and_card_come_along(tmp_path: Path, base: Path, adapter: Path) -> None:
    for merge in (False, True):
        to = export_model(adapter, str(base), tmp_path / f"out{merge}", merge=merge, card=FACTS)
        assert (to / "chat_template.jinja").read_text() == TEMPLATE
        assert (to / "tokenizer.json").read_text() == '{"version": "1.0"}'
        assert json.loads((to / "generation_config.json").read_text()) == {"eos_token_id": 7}
        assert (to / "README.md").read_text() == card_text(FACTS, is_adapter=not merge)


def test_an_exported_adapter_loads_and_names_its_base_as_the_card_does(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    to = export_model(adapter, str(base), tmp_path / "out", merge=False, card=FACTS)
    torch.testing.assert_close(logits(adapted(base, to)), logits(adapted(base, adapter)), atol=0, rtol=0)
    assert json.loads((to / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny"
    assert str(tmp_path) not in "".join(path.read_text() for path in to.glob("*.json"))


@pytest.mark.parametrize("merge", [False, True])
def test_a_full_model_is_copied_as_it_is(tmp_path: Path, base: Path, merge: bool) -> None:
    full = tmp_path / "full"
    load(base).save_pretrained(full)
    (full / "pytorch_model.bin").write_bytes(b"pickle")
    (full / "modeling_evil.py").write_text("")
    own = (full / "generation_config.json").read_bytes()
    to = export_model(full, str(base), tmp_path / "out", merge=merge, card=FACTS)
    assert (to / "model.safetensors").read_bytes() == (full / "model.safetensors").read_bytes()
    assert (to / "generation_config.json").read_bytes() == own
    assert (to / "chat_template.jinja").read_text() == TEMPLATE
    assert not (to / "pytorch_model.bin").exists() and not (to / "modeling_evil.py").exists()


def test_weights_alone_take_the_config_of_their_base(tmp_path: Path, base: Path) -> None:
    source = tmp_path / "weights"
    source.mkdir()
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, source / "policy.safetensors", {"format": "pt"})
    to = export_model(source, str(base), tmp_path / "out", merge=False, card=FACTS)
    for name, tensor in load(to).named_parameters():
        torch.testing.assert_close(tensor.data, tensors[name] * 2)
    tensors.pop("model.norm.weight")
    save_file(tensors, source / "policy.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="do not fit config.json: {'missing_keys': .'model.norm.weight'"):
        export_model(source, str(base), tmp_path / "again", merge=False, card=FACTS)


def test_an_adapter_whose_names_do_not_fit_is_never_merged_as_nothing(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers.0.", "layers.9."): tensor for name, tensor in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="28 of 28 tensors differ"):
        export_model(adapter, str(base), tmp_path / "out", merge=True, card=FACTS)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_but_an_empty_folder_is_filled(tmp_path: Path, base: Path) -> None:
    occupied, empty, file = tmp_path / "occupied", tmp_path / "empty", tmp_path / "file"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    for to in (occupied, file):
        with pytest.raises(ModelError, match="nothing is overwritten"):
            export_model(base, None, to, merge=False, card=FACTS)
    assert [path.name for path in occupied.iterdir()] == ["mine.txt"]
    assert (export_model(base, None, empty, merge=False, card=FACTS) / "model.safetensors").is_file()


def test_what_is_missing_is_named_and_nothing_is_left_behind(tmp_path: Path, base: Path, adapter: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    pickled = save_adapter(tmp_path / "pickled", base)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    to = tmp_path / "out"
    for source, base_name, merge, message in (
        (adapter, None, False, "no tokenizer_config.json in"),
        (bare, str(base), False, "neither an adapter"),
        (pickled, str(base), True, "only safetensors are read"),
        (pickled, str(base), False, "only safetensors are read"),
    ):
        with pytest.raises(ModelError, match=message):
            export_model(source, base_name, to, merge=merge, card=FACTS)
    assert not to.exists() and leftovers(tmp_path) == []


def test_merging_needs_a_base(tmp_path: Path, adapter: Path) -> None:
    (adapter / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be merged without its base model"):
        export_model(adapter, None, tmp_path / "out", merge=True, card=FACTS)
    with pytest.raises(ModelError, match="not a base model's folder"):
        export_model(adapter, str(tmp_path), tmp_path / "out", merge=True, card=FACTS)


def test_a_broken_weight_file_is_refused(tmp_path: Path, base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        export_model(base, None, tmp_path / "out", merge=False, card=FACTS)
    assert leftovers(tmp_path) == []


def test_the_reading_back_finds_lost_tensors(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing_copy(source: Path, target: Path) -> None:
        tensors = load_file(source)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, target)

    monkeypatch.setattr("raylign.export.policy.shutil.copyfile", losing_copy)
    with pytest.raises(ModelError, match="1 of 28 tensors differ in name or shape"):
        export_model(adapter, str(base), tmp_path / "out", merge=False, card=FACTS)
    assert not (tmp_path / "out").exists()


def test_the_card_has_front_matter_and_the_facts() -> None:
    _, front, body = card_text(FACTS, is_adapter=True).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "someone/tiny",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "online-dpo", "raylign", "lora"],
    }
    facts = (
        "loss `sigmoid`, beta 0.1 |",
        "| Rounds | 3 |",
        "0.400 to 0.600",
        "95% interval",
        "per completion | 2.00 |",
    )
    for fact in (*facts, "- torch 2.13.0", "2305.18290"):
        assert fact in body


def test_the_card_of_a_run_without_a_reference_tells_no_kl() -> None:
    facts = replace(FACTS, evaluation=replace(EVALUATION, kl=None))
    assert "| KL to the reference, nats per completion | - |" in card_text(facts, is_adapter=False)


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        ("{beta: 0.2}", "`sigmoid`, beta 0.2"),
        ("{loss_type: ipo, beta: 1}", "`ipo`, beta 1"),
        ("{loss_type: sft}", "`sft`"),
    ],
)
def test_the_card_names_the_loss_of_the_run(loss: str, named: str, tmp_path: Path) -> None:
    report = RoundReport(1, 1, {}, (), {}, FACTS.evaluation, {})
    config = parse_config({"run": {"name": "mine"}}, [f"loss={loss}"])
    facts = card_facts(RunDirectory(tmp_path), config, report)
    assert (facts.name, facts.method.name) == ("mine", f"iterative online DPO, loss {named}")


def test_the_card_names_the_beta_that_the_guard_had_raised_by_then(tmp_path: Path) -> None:
    """Twice: after round 1 and after round 3."""
    directory, config = RunDirectory(tmp_path), parse_config({})
    raising = Decision(RaiseRule(measure="kl", above=1.0, action="raise_beta", factor=3.0), 2.0)
    for index, made in enumerate(((raising,), (), (raising,)), 1):
        directory.round(index).mkdir(parents=True)
        directory.write_decisions(index, made)
    reports = [RoundReport(index, index, {}, (), {}, FACTS.evaluation, {}) for index in (1, 2, 3, 4)]
    names = [card_facts(directory, config, report).method.name.rpartition(" ")[2] for report in reports]
    assert names == ["0.1", "0.3", "0.3", "0.9"]


@pytest.mark.parametrize(
    ("options", "named", "told", "tag"),
    [
        ([], "iterative online DPO, loss `sigmoid`", "best and worst answer of a prompt become a pair", "dpo"),
        (["pairing.type=all_pairs"], "iterative online DPO", "answers of a prompt become preference pairs", "dpo"),
        (
            ["pairing.type=ranking", "loss={loss_type: plackett_luce}"],
            "iterative online DPO, loss `plackett_luce`",
            "answers of a prompt are ranked by it",
            "dpo",
        ),
        (
            ["pairing.type=group", "loss={loss_type: grpo, importance_sampling_level: sequence}"],
            "online policy optimisation, loss `grpo` by whole sequences (GSPO), beta 0",
            "answer is weighed by its score in its group",
            "grpo",
        ),
    ],
)
def test_the_card_tells_what_became_of_the_answers(
    options: list[str], named: str, told: str, tag: str, tmp_path: Path
) -> None:
    report = RoundReport(1, 1, {}, (), {}, FACTS.evaluation, {})
    method = card_facts(RunDirectory(tmp_path), parse_config({}, options), report).method
    assert method.name.startswith(named) and told[:40] in method.told and tag in method.tags


@pytest.mark.parametrize(
    ("scoring", "named"),
    [
        ("{function: 'mine:score'}", "mine:score"),
        ("{type: judge, base_url: 'http://10.0.0.7:8000/v1', model: org/judge}", "judge org/judge"),
        ("{type: judge, base_url: 'http://10.0.0.7:8000/v1', model: /data/private/judge}", "judge judge"),
        (
            "{type: gate, gate: {type: verifier}, score: {type: http, url: 'http://10.0.0.7/'}}",
            "score where gate >= 1, else -1 (gate: verifier by math, score: reward service)",
        ),
    ],
)
def test_the_card_names_the_scorer_without_addresses(scoring: str, named: str, tmp_path: Path) -> None:
    report = RoundReport(1, 1, {}, (), {}, FACTS.evaluation, {})
    facts = card_facts(RunDirectory(tmp_path), parse_config({}, [f"scoring={scoring}"]), report)
    assert facts.method.facts["Scorer"] == named


def test_framework_versions_are_those_installed() -> None:
    versions = framework_versions()
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"raylign", "transformers", "peft"} <= versions.keys()
