"""Low-rank adapters: nothing at first, little of the model in motion, an ordinary model after."""

from pathlib import Path

import torch
from torch import nn

from fp8.convert import convert_to_float8_training
from fusion.models import ModelSpec, build_model
from participant.stages import adapters
from participant.stages.adapters import LowRank
from tests.participant.stages.test_chain import Home, same, weights

IDS = torch.arange(24).view(2, 12)
SPEC = ModelSpec(architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=64, context=32)


def test_attached_adapters_say_nothing_until_they_have_learnt() -> None:
    model = build_model(SPEC, 0).eval()
    convert_to_float8_training(model)
    with torch.no_grad():
        before = model(IDS).logits
        assert adapters.attach(model, 4, scale=2.0, seed=0) == 7
        assert torch.equal(model(IDS).logits, before)
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moving == {n for n, _ in model.named_parameters() if n.endswith((".up", ".down"))}
    assert len(moving) == 14


def test_a_folded_model_is_an_ordinary_one_that_answers_the_same() -> None:
    model = build_model(SPEC, 0).eval()
    names = list(model.state_dict())
    adapters.attach(model, 4, scale=0.5, seed=0)
    for module in model.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.up, std=0.1)
    with torch.no_grad():
        before = model(IDS).logits
        assert adapters.fold(model) == 7
        torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-4)
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    assert adapters.fold(model) == 0


def test_a_stage_with_adapters_moves_linear_layers_alone_and_may_be_cut(tmp_path: Path) -> None:
    homes = []
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        homes.append(Home(tmp_path / name))
    whole, cut = homes
    assert whole.develop(whole.stage(adapter_rank=4))
    stage = cut.stage(adapter_rank=4)
    while not cut.develop(stage, stop_after=3):
        assert not cut.expert.ready
    assert same(whole.expert.directory, cut.expert.directory)
    before = weights(whole.expert.stages / "0-cpt" / "model")
    after = weights(whole.expert.directory)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("_proj.weight")}
