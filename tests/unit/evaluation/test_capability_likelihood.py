"""Log-likelihoods through the trainer's own forward pass, beside transformers' eager logits of the same texts."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raylign.config.blocks import TrainerBlock
from raylign.errors import DataError, TrainerError
from raylign.evaluation.capability.likelihood import Encoder, Measured, encode
from raylign.evaluation.capability.tasks import Passage, Question, Task
from raylign.records import Completions
from raylign.training.batches import Passes
from raylign.training.logprobs import CompletionLogps
from raylign.training.sequences import Layout

MERGES = [("=", "Ġ"), ("i", "t"), ("it", "s"), ("Ġ", "it"), ("Ġ", "a"), ("a", "b"), ("c", "d"), ("ab", "cd")]
WINDOW = 12


def tokenizer_of(*, begins: bool = False) -> PreTrainedTokenizerBase:
    """Byte-level BPE with a few merges, one of them over a boundary; `begins` puts BOS before every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *letters, *dict.fromkeys("".join(pair) for pair in MERGES)]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if begins:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def model_of() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    return model


def eager(ids: Sequence[int], scored: int) -> float:
    """Summed log-prob of the last `scored` of `ids`, from transformers' logits in fp64."""
    with torch.no_grad():
        logits: Any = model_of().double()(input_ids=torch.tensor([list(ids)])).logits[0]
    table = logits.log_softmax(-1)
    return sum(float(table[place - 1, ids[place]]) for place in range(len(ids) - scored, len(ids)))


def measured(encoded: Measured, layout: Layout = "shared") -> list[tuple[float, ...]]:
    """As a rank does it (`DeepSpeedRank.policy_logps`), in fp32."""
    passes, block = Passes(layout, 1, torch.device("cpu")), TrainerBlock(per_device_train_batch_size=2)
    module = CompletionLogps(model_of())
    shown: list[int] = []
    found = encoded.measure(lambda rows: passes.logps(module, rows, 0, block), shown.append)
    assert sum(shown) == encoded.rows
    return [item.logps for item in found]


QUESTIONS = Task(
    "quiz",
    (
        Question("0", "Question: is it so?\nAnswer:", ("it is", "no", "maybe it is not"), 0),
        Question("1", "ab", ("cd", "its"), 1),
    ),
)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_choices_have_the_log_probs_of_transformers(layout: Layout, begins: bool) -> None:
    encoder = Encoder(tokenizer_of(begins=begins), 64, "generators.max_model_len")
    found = measured(encode(QUESTIONS, encoder), layout)
    for item, logps in zip(QUESTIONS.items, found, strict=True):
        assert isinstance(item, Question)
        for choice, logp in zip(item.choices, logps, strict=True):
            context, whole = (
                list(encoder.tokenizer(part).input_ids) for part in (item.context, f"{item.context} {choice}")
            )
            assert (whole[0] == 0) == begins
            assert whole[: len(context)] == context, "no token straddles this boundary"
            assert logp == pytest.approx(eager(whole, len(whole) - len(context)), abs=1e-4)


def test_what_is_kept_of_every_choice() -> None:
    encoded = encode(QUESTIONS, Encoder(tokenizer_of(), 64, ""))
    first = encoded.measure(lambda rows: [[-1.0] * len(row.completions) for row in rows], lambda rows: None)[0]
    assert (first.sizes, first.answer, first.id) == ((5, 2, 15), 0, "0")


@pytest.mark.parametrize("begins", [False, True])
def test_a_token_that_straddles_the_boundary_is_the_continuations(begins: bool) -> None:
    """`ab`, `abcd` and `= ` are tokens: of "abcd" nothing is left once the context "ab" has taken its one token."""
    encoder = Encoder(tokenizer_of(begins=begins), 64, "")
    first, begin = encoder.ids, [0] if begins else []
    assert first("x= it") == [*first("x"), *first("= "), *first("it")] and len(first("= ")) == 1
    assert encoder.pair("x=", " it") == ([*begin, *first("x=")], first("it"))
    assert encoder.pair("x= ", "it") == encoder.pair("x=", " it"), "spaces are the continuation's"
    assert encoder.pair("x ", "it") == ([*begin, *first("x")], first(" it")) and len(first(" it")) == 1
    assert encoder.pair("ab", "cd") == ([*begin, *first("ab")], [])
    assert encoder.pair("ab", "cdit") == ([*begin, *first("ab")], first("it"))
    assert encoder.pair("", "it") == ([0], first("it")) and encoder.pair("  ", "it") == ([0], first("  it"))


def test_choices_without_a_token_or_beyond_the_window_are_refused() -> None:
    encoder = Encoder(tokenizer_of(), WINDOW, "data.max_length")
    long = Task("quiz", (Question("7", "xxxxxxxxxx", ("a", "bef"), 0),))
    with pytest.raises(DataError, match=r"task quiz, item 7: 14 tokens with choice 'bef', more than data.max"):
        encode(long, encoder)


@pytest.mark.parametrize("length", [1, 5, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW - 2, 2 * WINDOW - 1, 40])
def test_windows_roll_over_every_token_once(length: int) -> None:
    encoder = Encoder(tokenizer_of(), WINDOW, "")
    text = "".join(chr(ord("b") + 7 * i % 23) for i in range(length))
    ids, rows = encoder.ids(text), encoder.windows(text)
    assert len(ids) == length
    assert [token for row in rows for token in row.completions[0]] == ids
    assert rows[0].prompt == (0,)
    placed = 0
    for row in rows:
        own = row.completions[0]
        before = [0, *ids][: placed + 1]
        assert list(row.prompt) == before[len(before) - len(row.prompt) :], "what stands before it, and nothing else"
        assert len(row.prompt) + len(own) == min(WINDOW, len([0, *ids]) if len(rows) == 1 else WINDOW)
        placed += len(own)
    assert all(len(row.prompt) == 1 for row in rows[:-1])


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_text_longer_than_the_window_has_the_log_probs_of_transformers(layout: Layout) -> None:
    encoder = Encoder(tokenizer_of(begins=True), WINDOW, "")
    text = "it is said that its end is not near"
    ids = [0, *encoder.ids(text)]
    first, second = eager(ids[:WINDOW], WINDOW - 1), eager(ids[WINDOW - 1 : 2 * WINDOW - 1], WINDOW - 1)
    rest = len(ids) - 1 - 2 * (WINDOW - 1)
    assert 0 < rest < WINDOW
    third = eager(ids[-WINDOW:], rest)
    encoded = encode(Task("news", (Passage("a", text), Passage("b", "it"))), encoder)
    (whole,), (short,) = measured(encoded, layout)
    assert whole == pytest.approx(first + second + third, abs=1e-4)
    assert short == pytest.approx(eager([0, *encoder.ids("it")], 1), abs=1e-4)
    results = encoded.measure(lambda rows: [[-1.0] for _ in rows], lambda rows: None)
    assert (results[0].tokens, results[0].sizes) == (len(ids) - 1, (len(text),))


def test_log_probs_that_are_not_finite_stop_it() -> None:
    encoded = encode(QUESTIONS, Encoder(tokenizer_of(), 64, ""))
    with pytest.raises(TrainerError, match="task quiz: the policy gives log-probs that are not finite"):
        encoded.measure(lambda rows: [[float("nan")] * 3 for _ in rows], lambda rows: None)


def test_shares_of_ranks_are_those_of_one() -> None:
    """Rank r of n has rows r, r + n, ...; each runs as many, the last perhaps for nothing."""
    passes, module = Passes("shared", 1, torch.device("cpu")), CompletionLogps(model_of())
    rows = [Completions((3, 4), ((5 + n, 6), (7,))) for n in range(5)]
    alone = passes.logps(module, rows, 0, TrainerBlock())
    for world in (2, 4, 8):
        block = TrainerBlock(ranks=world, per_device_train_batch_size=1)
        shares = [passes.logps(module, rows, rank, block) for rank in range(world)]
        joined = [shares[index % world][index // world] for index in range(len(rows))]
        assert [value for row in joined for value in row] == pytest.approx([v for row in alone for v in row], abs=1e-5)
