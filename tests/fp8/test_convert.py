from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fp8.convert import convert_to_float8_training
from fp8.linear import Float8Linear
from fp8.recipe import BlockScaling

ModelMaker = Callable[..., PreTrainedModel]
EXPECTED = {"llama": 7, "qwen2": 7, "gpt_neox": 4}  # linear layers per decoder layer
IDS = torch.arange(60).reshape(2, 30)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", EXPECTED)
def test_every_decoder_matrix_is_converted_and_no_other(
    tiny_model: ModelMaker, architecture: str, tied: bool
) -> None:
    model, plain = tiny_model(architecture, tied=tied), tiny_model(architecture, tied=tied)
    before = dict(model.named_parameters())
    report = convert_to_float8_training(model)
    layers = {n for n, m in model.named_modules() if isinstance(m, Float8Linear)}
    assert set(report.converted) == layers
    assert len(layers) == 2 * EXPECTED[architecture]
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear
    names = {id(m): n for n, m in model.named_modules()}
    assert set(report.skipped) == {names[id(head)], names[id(model.get_input_embeddings())]}
    assert all(report.skipped.values())
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert model.state_dict().keys() == plain.state_dict().keys()
    wanted = plain(IDS, labels=IDS).loss.item()
    assert model(IDS, labels=IDS).loss.item() == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("architecture", EXPECTED)
def test_gradients_of_a_whole_model_are_near_fp32(
    tiny_model: ModelMaker, architecture: str
) -> None:
    model, plain = tiny_model(architecture, hidden=96), tiny_model(architecture, hidden=96)
    converted = convert_to_float8_training(model).converted
    ids = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    for m in (model, plain):
        m(ids, labels=ids).loss.backward()
    for name in converted:
        found = model.get_submodule(name).weight.grad
        wanted = plain.get_submodule(name).weight.grad
        assert float((found - wanted).norm() / wanted.norm()) <= 0.14, name
        assert float(nn.functional.cosine_similarity(found.ravel(), wanted.ravel(), 0)) >= 0.99


def test_a_converted_model_saves_as_an_ordinary_one(tiny_model: ModelMaker, tmp_path: Path) -> None:
    model = tiny_model("llama", tied=True).eval()
    wanted = model(IDS).logits
    convert_to_float8_training(model)
    model(IDS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, wanted)


def test_a_layer_in_two_places_stays_one_layer() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(8, 8)})
    report = convert_to_float8_training(model)
    assert report.converted == ("a", "b.0", "c")
    assert model["a"] is model["b"][0]  # type: ignore[index]
    assert isinstance(model["a"], Float8Linear)


def test_what_cannot_be_converted_is_named_with_the_reason() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    report = convert_to_float8_training(model)
    assert report.converted == ()
    assert "Conv1D" in report.skipped["transformer.h.0.attn.c_attn"]
    assert "nn.Linear" in convert_to_float8_training(nn.Bilinear(3, 3, 3)).skipped[""]
    assert "itself" in convert_to_float8_training(nn.Linear(3, 3)).skipped[""]


def test_a_head_tied_to_an_embedding_is_left_whatever_its_name() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "out": nn.Linear(4, 9, bias=False)})
    model["out"].weight = model["words"].weight
    report = convert_to_float8_training(model, module_filter_fn=lambda _module, _fqn: True)
    assert report.converted == ()
    assert "tied" in report.skipped["out"]


def test_filter_and_recipe_are_obeyed_and_converting_twice_is_harmless() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    recipe = BlockScaling(block=32)
    report = convert_to_float8_training(model, recipe, lambda _module, fqn: fqn == "1")
    assert report.converted == ("1",)
    assert set(report.skipped) == {"0"}
    assert isinstance(model[1], Float8Linear)
    assert model[1].recipe is recipe
    assert convert_to_float8_training(model).converted == ("0",)
    assert model[1].recipe is recipe
