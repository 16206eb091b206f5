from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from fusion.byte_tables import byte_table
from fusion.models import (
    EOS,
    Architecture,
    ModelSpec,
    build_model,
    encode_documents,
    encode_text,
    load_model,
    load_parameter_arrays,
    parameter_arrays,
    save_model,
    train_tokenizer,
)

TEXTS = ["Code I63.9 is cerebral infarction.", "Neoplasm of breast, caf\u00e9."] * 5
TOKENIZER = train_tokenizer(TEXTS, 320)
ARCHITECTURES = get_args(Architecture)


def spec(architecture: Architecture) -> ModelSpec:
    return ModelSpec(
        architecture=architecture,
        hidden_size=32,
        layers=2,
        heads=2,
        vocab_size=len(TOKENIZER),
        context=64,
    )


@given(st.text())
def test_no_byte_of_any_text_is_lost(text: str) -> None:
    table = byte_table(TOKENIZER, len(TOKENIZER)).pieces
    assert b"".join(table[i] for i in encode_text(TOKENIZER, text)) == text.encode()


def test_eos_written_in_a_text_is_text() -> None:
    ids = encode_text(TOKENIZER, f"a{EOS}b")
    assert 0 not in ids
    assert len(ids) > 3


def test_every_document_ends_in_eos_and_none_starts_with_anything_else() -> None:
    stream = encode_documents(TOKENIZER, ["Code", "", "Code"])
    code = encode_text(TOKENIZER, "Code")
    assert stream.tolist() == [*code, 0, 0, *code, 0]


def test_the_tokenizer_is_a_function_of_the_text() -> None:
    again = train_tokenizer(TEXTS, 320)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert TOKENIZER.get_vocab()[EOS] == 0
    with pytest.raises(ValueError, match="257"):
        train_tokenizer(TEXTS, 100)


def test_padding_ids_and_eos_write_no_bytes() -> None:
    table = byte_table(TOKENIZER, len(TOKENIZER) + 3).pieces
    assert [i for i, piece in enumerate(table) if not piece] == [
        0,
        *range(len(TOKENIZER), len(TOKENIZER) + 3),
    ]
    assert len(set(table)) == len(TOKENIZER)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_model_is_an_ordinary_folder_that_computes_and_encodes_the_same(
    architecture: Architecture, tmp_path: Path
) -> None:
    model = build_model(spec(architecture), 3)
    save_model(model, TOKENIZER, tmp_path)
    loaded, tokenizer = load_model(tmp_path)
    foreign = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([encode_text(TOKENIZER, TEXTS[0])])
    for other in (loaded, foreign):
        assert torch.equal(model(ids).logits, other(ids).logits)
        assert other.dtype == torch.float32
    for text in [*TEXTS[:2], f"x  {EOS} \u00e9\n"]:
        assert encode_text(tokenizer, text) == encode_text(TOKENIZER, text)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_seed_names_the_weights_and_leaves_the_global_generator_alone(
    architecture: Architecture,
) -> None:
    torch.manual_seed(5)
    one, two, three = (build_model(spec(architecture), seed) for seed in (1, 1, 2))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    other = [torch.equal(a, b) for a, b in zip(one.parameters(), three.parameters(), strict=True)]
    assert all(same)
    assert not all(other)


def test_models_are_loaded_and_built_in_threads_side_by_side_as_they_are_alone(
    tmp_path: Path,
) -> None:
    """transformers switches torch's initialisers off, for the whole process, while it loads."""
    alone = build_model(spec("llama"), 3)
    save_model(alone, TOKENIZER, tmp_path)

    def make(job: int) -> PreTrainedModel:
        return build_model(spec("llama"), 3) if job % 2 else load_model(tmp_path)[0]

    initialise = torch.nn.init.normal_
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(64)))
    for model in made:
        pairs = zip(alone.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert torch.nn.init.normal_ is initialise


def test_parameter_arrays_go_back_into_another_model_and_tied_ones_come_once() -> None:
    one, two = build_model(spec("llama"), 1), build_model(spec("llama"), 2)
    arrays = parameter_arrays(one)
    assert sum(a.size for a in arrays.values()) == sum(p.numel() for p in one.parameters())
    load_parameter_arrays(two, arrays)
    assert all(np.array_equal(a, parameter_arrays(two)[name]) for name, a in arrays.items())
    with pytest.raises(ValueError, match="one side only"):
        load_parameter_arrays(build_model(spec("gpt_neox"), 1), arrays)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_ids_embedding_learns_also_that_of_eos(architecture: Architecture) -> None:
    model = build_model(spec(architecture), 0)
    assert model.get_input_embeddings().weight[0].abs().sum() > 0
    model.get_input_embeddings()(torch.tensor([0])).sum().backward()
    assert model.get_input_embeddings().weight.grad[0].abs().sum() > 0
