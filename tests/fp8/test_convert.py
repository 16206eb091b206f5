from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fp8.backends.base import UnsupportedBackendError
from fp8.convert import convert_to_float8_training, layers_to_convert, revert_to_float
from fp8.linear import Float8Linear
from fp8.recipe import NVFP4, RECIPES, BlockScaling, RowwiseScaling

ModelMaker = Callable[..., PreTrainedModel]
EXPECTED = {
    "llama": 7,
    "mistral": 7,
    "qwen2": 7,
    "qwen3": 7,
    "gpt_neox": 4,
}  # linear layers per decoder layer
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


def test_every_converted_layer_has_a_backend_and_the_reason_for_no_faster_one(
    tiny_model: ModelMaker,
) -> None:
    report = convert_to_float8_training(tiny_model())
    assert set(report.backends) == set(report.converted)
    assert {name for name, _ in report.backends.values()} == {"emulated"}
    assert all("scaled_mm" in why for _, why in report.backends.values())
    assert "14 layers converted, 2 left" in str(report)
    assert "emulated" in str(report)
    assert "left, embedding: 1" in str(report)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name_and_nothing_changes(
    tiny_model: ModelMaker, bad: float
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4:6] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj holds 2 values"):
        convert_to_float8_training(model)
    assert not any(isinstance(m, Float8Linear) for m in model.modules())


def test_a_named_backend_that_cannot_leaves_the_model_as_it_was(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    with pytest.raises(UnsupportedBackendError, match="use backend='auto'"):
        convert_to_float8_training(model, BlockScaling(backend="scaled_mm"))
    assert not any(isinstance(m, Float8Linear) for m in model.modules())


def test_the_last_blocks_stay_in_high_precision_if_the_recipe_says_so(
    tiny_model: ModelMaker,
) -> None:
    report = convert_to_float8_training(tiny_model(layers=5), NVFP4(keep_last=0.3))
    assert {name.split(".")[2] for name in report.converted} == {"0", "1", "2"}
    left = {name for name, why in report.skipped.items() if "last blocks" in why}
    assert {name.split(".")[2] for name in left} == {"3", "4"}
    assert len(left) == 14


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_head_is_converted_when_it_has_a_recipe(tiny_model: ModelMaker, tied: bool) -> None:
    model, plain = tiny_model(tied=tied), tiny_model(tied=tied)
    report = convert_to_float8_training(model, head=RowwiseScaling())
    head = model.get_output_embeddings()
    assert isinstance(head, Float8Linear)
    assert head.recipe == RowwiseScaling()
    assert "lm_head" in report.converted
    assert (head.weight is model.get_input_embeddings().weight) == tied
    wanted = plain(IDS, labels=IDS).loss.item()
    assert model(IDS, labels=IDS).loss.item() == pytest.approx(wanted, rel=0.02)


def test_reverting_gives_the_plain_model_back(tiny_model: ModelMaker) -> None:
    model, plain = tiny_model(), tiny_model()
    wanted = plain(IDS).logits
    convert_to_float8_training(model, swiglu="recompute", fuse_norms=True)
    assert not torch.equal(model(IDS).logits, wanted)
    assert revert_to_float(model) == 14
    assert torch.equal(model(IDS).logits, wanted)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("name", RECIPES)
def test_what_will_be_converted_can_be_asked_before_and_after(
    tiny_model: ModelMaker, name: str
) -> None:
    model, recipe = tiny_model(layers=3), RECIPES[name]()
    wanted = layers_to_convert(model, recipe)
    report = convert_to_float8_training(model, recipe)
    assert set(wanted) == set(report.converted)
    assert set(layers_to_convert(model, recipe)) == set(report.converted)
