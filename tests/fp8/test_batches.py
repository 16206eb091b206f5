import struct
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fp8.batches import IGNORED, count_tokens, packed_documents, part_of
from fp8.convert import convert_to_float8_training
from fp8.documents import Documents, TokenFile
from fp8.losses import causal_lm_loss
from fp8.recipe import BlockScaling
from fp8.train import packed_batches

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(30, 300),
    batch_size=st.integers(1, 9),
    seq_len=st.integers(1, 29),
    seed=st.integers(0, 99),
)
def test_an_epoch_predicts_every_token_once(
    tokens: int, batch_size: int, seq_len: int, seed: int
) -> None:
    batch_at = packed_batches(range(tokens), batch_size=batch_size, seq_len=seq_len, seed=seed)
    windows = (tokens - 1) // seq_len
    steps = -(-2 * windows // batch_size)
    rows = torch.cat([batch_at(step) for step in range(steps)])
    assert rows.dtype == torch.int64
    assert rows.shape == (steps * batch_size, seq_len + 1)
    assert bool((rows.diff(dim=1) == 1).all())
    for epoch in (rows[:windows], rows[windows : 2 * windows]):
        predicted = epoch[:, 1:].flatten().sort().values
        assert torch.equal(predicted, predicted[0] + torch.arange(windows * seq_len))
    later = packed_batches(range(tokens), batch_size=batch_size, seq_len=seq_len, seed=seed)
    assert torch.equal(later(steps - 1), batch_at(steps - 1))


def test_epochs_and_seeds_shuffle_anew() -> None:
    first = packed_batches(range(801), batch_size=100, seq_len=8, seed=0)
    other = packed_batches(range(801), batch_size=100, seq_len=8, seed=1)
    assert not torch.equal(first(0), first(1))
    assert not torch.equal(first(0), other(0))
    assert not torch.equal(first(0), first(0).sort(0).values)


@pytest.mark.parametrize(
    ("stream", "says"), [([], "lower seq_len"), ([1, 2, 3], "lower seq_len"), ([[1] * 50], "shape")]
)
def test_a_stream_without_a_window_is_refused(stream: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        packed_batches(stream, batch_size=1, seq_len=8, seed=0)


# -- documents


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents in which token t of document d is 1000 d + t."""
    return [[1000 * d + t for t in range(n)] for d, n in enumerate(lengths)]


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 5),
    seq_len=st.integers(2, 25),
    seed=st.integers(0, 9),
)
def test_a_window_of_documents_knows_where_each_token_stands(
    lengths: list[int], batch_size: int, seq_len: int, seed: int
) -> None:
    documents = Documents.of(numbered(lengths))
    if sum(lengths) <= seq_len:
        with pytest.raises(ValueError, match="lower seq_len"):
            packed_documents(documents, batch_size=batch_size, seq_len=seq_len, seed=seed)
        return
    batch_at = packed_documents(documents, batch_size=batch_size, seq_len=seq_len, seed=seed)
    windows = (sum(lengths) - 1) // seq_len
    batches = [batch_at(step) for step in range(-(-windows // batch_size))]
    ids, positions, labels = (
        torch.cat([batch[name] for batch in batches])
        for name in ("input_ids", "position_ids", "labels")
    )
    assert {ids.dtype, positions.dtype, labels.dtype} == {torch.int64}
    same = ids[:, 1:] // 1000 == ids[:, :-1] // 1000
    first = torch.zeros(len(ids), 1, dtype=torch.bool)
    follows = torch.cat([first, same], dim=1)
    assert torch.equal(ids[:, 1:][same] - ids[:, :-1][same], torch.ones(int(same.sum())).long())
    assert torch.equal(positions == 0, ~follows)
    assert torch.equal(positions[:, 1:][same], positions[:, :-1][same] + 1)
    assert torch.equal(labels, ids.where(follows, torch.tensor(IGNORED)))
    assert bool(follows.any(dim=1).all())  # every row predicts something
    predicted = labels[:windows][labels[:windows] != IGNORED]
    assert len(predicted.unique()) == len(predicted)  # at most once in an epoch
    assert sum(count_tokens(batch) for batch in batches) == int(follows.sum())
    stream = packed_batches(documents.tokens, batch_size=batch_size, seq_len=seq_len, seed=seed)
    assert torch.equal(ids, torch.cat([stream(step) for step in range(len(batches))]))
    again = packed_documents(documents, batch_size=batch_size, seq_len=seq_len, seed=seed)
    assert torch.equal(again(len(batches) - 1)["position_ids"], batches[-1]["position_ids"])


def model_of(model_type: str, attention: str) -> PreTrainedModel:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
    sizes |= {"intermediate_size": 96, "max_position_embeddings": 64}
    if model_type != "gpt_neox":
        sizes["num_key_value_heads"] = 2
    window = {"sliding_window": 5} if model_type == "mistral" else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes, **window)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


MODELS = [
    (model_type, attention)
    for model_type in ("llama", "qwen2", "qwen3", "mistral", "gpt_neox")
    for attention in ("sdpa", "eager")
]


@pytest.mark.parametrize(("model_type", "attention"), MODELS)
def test_no_bit_of_a_documents_logits_depends_on_its_neighbours(
    model_type: str, attention: str
) -> None:
    """True for every model family, for both attentions, and with FP8 layers in the model."""
    model = model_of(model_type, attention)
    convert_to_float8_training(model, BlockScaling())
    rng = np.random.default_rng(0)
    lengths = [7, 12, 2, 9]
    one = [rng.integers(0, 200, n).tolist() for n in lengths]
    other = [rng.integers(0, 200, n).tolist() for n in lengths]

    def logits(documents: list[list[int]]) -> Tensor:
        batch = packed_documents(Documents.of(documents), batch_size=1, seq_len=29, seed=0)(0)
        with torch.no_grad():
            out: Tensor = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                use_cache=False,
            ).logits
        return out[0]

    wanted = logits(one).split(lengths)
    for changed in range(4):
        documents = [other[d] if d == changed else one[d] for d in range(4)]
        for d, found in enumerate(logits(documents).split(lengths)):
            assert torch.equal(found, wanted[d]) == (d != changed)


@pytest.mark.parametrize(("model_type", "attention"), MODELS)
def test_the_loss_is_that_of_the_documents_alone(model_type: str, attention: str) -> None:
    model = model_of(model_type, attention)
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 200, n).tolist() for n in (7, 12, 2, 9)]
    batch = packed_documents(Documents.of(documents), batch_size=1, seq_len=29, seed=0)(0)
    tokens = [len(document) - 1 for document in documents]
    assert count_tokens(batch) == sum(tokens)
    alone = [causal_lm_loss(model, torch.tensor([document])) for document in documents]
    wanted = sum(n * loss for n, loss in zip(tokens, alone, strict=True)) / sum(tokens)
    for vocabulary in (1, 999):
        found = causal_lm_loss(model, batch, chunk_from_vocab=vocabulary)
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)
    torch.testing.assert_close(model(**batch, use_cache=False).loss, wanted, rtol=2e-6, atol=0)
    mixed = causal_lm_loss(model, {n: v for n, v in batch.items() if n != "position_ids"})
    assert abs(mixed.item() / wanted.item() - 1) > 1e-4  # position_ids are what keeps them apart


# -- token files


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), max_size=20), vocab=st.sampled_from([50_000, 2**16, 10**6])
)
def test_a_token_file_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], vocab: int
) -> None:
    path = tmp_path_factory.mktemp("tokens") / "corpus.tokens"
    documents = [[(t * 977 + d) % vocab for t in range(n)] for d, n in enumerate(lengths)]
    written = TokenFile.write(path, iter(documents), vocab_size=vocab)
    for found in (written, TokenFile.open(path), Documents.of(documents)):
        assert [document.tolist() for document in found] == documents
        assert len(found) == len(documents)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    width = 2 if vocab <= 2**16 else 4
    assert path.stat().st_size <= 40 + width * sum(lengths) + 8 * (len(lengths) + 2)


def test_a_file_and_memory_give_the_same_batches(tmp_path: Path) -> None:
    documents = numbered([5, 3, 40, 2, 11, 6])
    sizes = {"batch_size": 3, "seq_len": 8, "seed": 4}
    on_disk = packed_documents(TokenFile.write(tmp_path / "c", documents), **sizes)
    in_memory = packed_documents(Documents.of(documents), **sizes)
    for step in range(5):
        for name, wanted in in_memory(step).items():
            assert torch.equal(on_disk(step)[name], wanted)


def test_a_corpus_larger_than_memory_would_train(tmp_path: Path) -> None:
    """Writing and reading hold a document and a batch: here 40 kB of 16 MB."""

    def documents() -> Iterator[np.ndarray[Any, Any]]:
        for _ in range(4000):
            yield np.arange(1000, dtype=np.uint32)

    tracemalloc.start()
    corpus = TokenFile.write(tmp_path / "c", documents())
    batch_at = packed_documents(corpus, batch_size=4, seq_len=256, seed=0)
    for step in range(20):
        batch_at(step)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "c").stat().st_size > 16_000_000
    assert peak_bytes < 1_000_000


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "leave it out"),
        ([1], "leave it out"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([1, 100], r"in \[0, 100\)"),
        ([-1, 2], "vocabulary size"),
        ([1.0, 2.0], "wanted integers"),
    ],
    ids=str,
)
def test_a_document_that_cannot_be_trained_on_is_named(
    tmp_path: Path, document: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=rf"document 1 .*{says}"):
        TokenFile.write(tmp_path / "c", [[1, 2], document], vocab_size=100)
    assert not (tmp_path / "c").exists()


def test_a_file_that_is_damaged_or_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    TokenFile.write(path, numbered([3, 4]))
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole[:16] + struct.pack("<Q", 3) + whole[24:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="restore it, or write it anew"):
            TokenFile.open(path)
    for other in (b"", b"PK" + whole):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"not a token file; write it with TokenFile\.write"):
            TokenFile.open(path)


def test_documents_are_counted_from_zero() -> None:
    documents = Documents.of(numbered([3, 4]))
    assert documents[1].tolist() == [1000, 1001, 1002, 1003]
    for index in (-1, 2):
        with pytest.raises(IndexError, match="of 2"):
            documents[index]
    with pytest.raises(ValueError, match="at least 2"):
        packed_documents(documents, batch_size=1, seq_len=1, seed=0)


# -- pieces of a batch


@dataclass(frozen=True)
class Own:
    rows: Tensor

    def part(self, index: int, parts: int) -> "Own":
        return Own(self.rows.tensor_split(parts)[index])


@settings(deadline=None)
@given(rows=st.integers(1, 12), parts=st.integers(1, 12))
def test_the_pieces_are_the_batch(rows: int, parts: int) -> None:
    ids = torch.arange(rows * 3).reshape(rows, 3)
    labels = ids.masked_fill(ids % 4 == 0, IGNORED)
    makers: list[Callable[[], Any]] = [
        lambda: ids,
        lambda: {"input_ids": ids, "labels": labels},
        lambda: Own(ids),
    ]
    for make in makers[: 2 if parts > rows else 3]:
        if parts > rows:
            with pytest.raises(ValueError, match="accumulate less"):
                part_of(make(), 0, parts)
            continue
        pieces = [part_of(make(), index, parts) for index in range(parts)]
        found = [
            p["input_ids"] if isinstance(p, Mapping) else getattr(p, "rows", p) for p in pieces
        ]
        assert torch.equal(torch.cat(found), ids)
        assert max(map(len, found)) - min(map(len, found)) <= 1
        assert sum(map(count_tokens, pieces)) == count_tokens(make())


def test_a_batch_that_cannot_be_cut_says_how_it_could() -> None:
    with pytest.raises(TypeError, match=r"part\(index, parts\)"):
        part_of([1, 2, 3], 0, 2)
    assert part_of([1, 2, 3], 0, 1) == [1, 2, 3]
