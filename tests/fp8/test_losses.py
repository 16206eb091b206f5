from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, PreTrainedModel

from fp8.convert import convert_to_float8_training
from fp8.linear import Float8Linear
from fp8.losses import PLAIN_HEADS, causal_lm_loss, linear_cross_entropy
from fp8.recipe import BlockScaling

ModelMaker = Callable[..., PreTrainedModel]
CE = nn.functional.cross_entropy


def inputs(T: int = 50, H: int = 16, V: int = 301, dtype: torch.dtype = torch.float32) -> Any:
    g = torch.Generator().manual_seed(T + H)
    hidden_TH = torch.randn(T, H, generator=g).to(dtype).requires_grad_()
    targets_T = torch.randint(0, V, (T,), generator=g)
    targets_T[3::7] = -100
    head = nn.Linear(H, V, dtype=dtype)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return hidden_TH, targets_T, head


def whole(hidden_TH: Tensor, head: nn.Module, targets_T: Tensor) -> Tensor:
    return CE(head(hidden_TH).float(), targets_T)


def grads(loss: Tensor, hidden_TH: Tensor, head: nn.Module) -> list[Tensor]:
    leaves = [t for t in (hidden_TH, *head.parameters()) if t.requires_grad]
    return list(torch.autograd.grad(loss, leaves))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


# -- linear_cross_entropy


@settings(max_examples=30, deadline=None)
@given(T=st.integers(1, 60), chunk=st.integers(1, 70), scale=st.sampled_from([1.0, -3.0, 1e-3]))
def test_it_is_cross_entropy_on_whole_logits(T: int, chunk: int, scale: float) -> None:
    hidden_TH, targets_T, head = inputs(T)
    wanted = whole(hidden_TH, head, targets_T)
    found = linear_cross_entropy(hidden_TH, head, targets_T, chunk_tokens=chunk)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        grads(found * scale, hidden_TH, head),
        grads(wanted * scale, hidden_TH, head),
        rtol=1e-5,
        atol=1e-7,
    )


def test_in_bfloat16_it_is_about_as_close_to_the_truth_as_whole_logits() -> None:
    hidden_TH, targets_T, head = inputs(256, dtype=torch.bfloat16)
    found = linear_cross_entropy(hidden_TH, head, targets_T, chunk_tokens=32)
    wanted = whole(hidden_TH, head, targets_T)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    in_32 = [hidden_TH.detach().float().requires_grad_(), nn.Linear(16, 301)]
    in_32[1].load_state_dict(head.state_dict())
    exact = grads(whole(in_32[0], in_32[1], targets_T), *in_32)
    for ours, theirs, true in zip(
        grads(found, hidden_TH, head), grads(wanted, hidden_TH, head), exact, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        error, allowed = (ours - true).norm(), (theirs - true).norm()
        assert error <= 2 * allowed  # parameters: a rounding per chunk, not one


def test_no_tensor_has_the_size_of_all_logits() -> None:
    hidden_TH, targets_T, head = inputs(T=640, H=8, V=512)
    with Largest() as largest:
        grads(linear_cross_entropy(hidden_TH, head, targets_T, chunk_tokens=64), hidden_TH, head)
    assert largest.elements == 64 * 512
    with Largest() as largest, torch.no_grad():
        linear_cross_entropy(hidden_TH, head, targets_T, chunk_tokens=64)
    assert largest.elements == 64 * 512
    with Largest() as largest:
        grads(whole(hidden_TH, head, targets_T), hidden_TH, head)
    assert largest.elements == 640 * 512


def test_the_forward_leaves_only_gradients_behind() -> None:
    hidden_TH, targets_T, head = inputs(T=640, H=8, V=512)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        linear_cross_entropy(hidden_TH, head, targets_T, chunk_tokens=64)
    assert max(kept[-3:]) <= max(512 * 8, 640 * 8)  # the last ones: the function's own


@pytest.mark.parametrize("frozen", ["hidden", "head", "bias", "all"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    hidden_TH, targets_T, head = inputs()
    for name, tensors in {
        "hidden": [hidden_TH],
        "head": list(head.parameters()),
        "bias": [head.bias],
        "all": [hidden_TH, *head.parameters()],
    }.items():
        if name == frozen:
            for tensor in tensors:
                tensor.requires_grad_(False)
    found = linear_cross_entropy(hidden_TH, head, targets_T, chunk_tokens=16)
    wanted = whole(hidden_TH, head, targets_T)
    torch.testing.assert_close(found, wanted)
    assert found.requires_grad == wanted.requires_grad == (frozen != "all")
    if found.requires_grad:
        torch.testing.assert_close(grads(found, hidden_TH, head), grads(wanted, hidden_TH, head))


def test_without_gradients_it_only_counts() -> None:
    hidden_TH, targets_T, head = inputs()
    with torch.no_grad():
        found = linear_cross_entropy(hidden_TH, head, targets_T, chunk_tokens=16)
    assert not found.requires_grad
    torch.testing.assert_close(found, whole(hidden_TH, head, targets_T).detach())


def test_a_tied_weight_gets_both_gradients() -> None:
    def gradient(chunked: bool) -> Tensor:
        torch.manual_seed(0)
        embed, head = nn.Embedding(301, 16), nn.Linear(16, 301, bias=False)
        head.weight = embed.weight
        ids_T, targets_T = torch.arange(40), torch.arange(1, 41)
        hidden_TH = embed(ids_T).tanh()
        if chunked:
            linear_cross_entropy(hidden_TH, head, targets_T, chunk_tokens=9).backward()
        else:
            whole(hidden_TH, head, targets_T).backward()
        assert embed.weight.grad is not None
        return embed.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-5, atol=1e-7)


def test_an_fp8_head_quantises_in_chunks_of_128_as_it_does_whole() -> None:
    hidden_TH, targets_T, linear = inputs(T=384, H=128, V=256)
    head = Float8Linear.from_float(linear, BlockScaling(gemm="float32"))
    found = linear_cross_entropy(hidden_TH, head, targets_T, chunk_tokens=128)
    wanted = whole(hidden_TH, head, targets_T)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        grads(found, hidden_TH, head), grads(wanted, hidden_TH, head), rtol=1e-4, atol=1e-6
    )


def test_when_nothing_counts_the_mean_is_nan_as_in_torch() -> None:
    hidden_TH, targets_T, head = inputs()
    targets_T[:] = -100
    assert linear_cross_entropy(hidden_TH, head, targets_T).isnan()


def test_it_refuses_what_does_not_fit() -> None:
    hidden_TH, targets_T, head = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden_TH, head, targets_T[:-1])
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden_TH, head, targets_T, chunk_tokens=0)


# -- causal_lm_loss


def of_type(model_type: str) -> PreTrainedModel:
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if model_type == "gpt_neox":
        del sizes["num_key_value_heads"]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))


def ids(rows: int = 3, T1: int = 20) -> Tensor:
    return torch.randint(0, 256, (rows, T1), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("model_type", sorted(PLAIN_HEADS))
def test_both_ways_to_the_loss_are_one(model_type: str) -> None:
    model = of_type(model_type)
    found: list[list[Tensor]] = []
    for vocabulary in (1, 10**9):
        loss = causal_lm_loss(model, ids(), chunk_from_vocab=vocabulary, chunk_tokens=13)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*found, rtol=2e-4, atol=1e-6)


def test_a_large_vocabulary_is_never_laid_out_whole() -> None:
    model, batch = of_type("qwen2"), ids(4, 33)
    whole_logits = 4 * 32 * 300
    for vocabulary, is_whole in ((300, False), (301, True)):
        with Largest() as largest:
            causal_lm_loss(model, batch, chunk_from_vocab=vocabulary, chunk_tokens=32).backward()
        assert (largest.elements >= whole_logits) == is_whole


def test_a_head_with_something_after_it_keeps_its_whole_logits() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        vocab_size=300,
        final_logit_softcapping=1.0,
    )
    model = AutoModelForCausalLM.from_config(config)
    found = causal_lm_loss(model, ids(), chunk_from_vocab=1)
    torch.testing.assert_close(found, model(input_ids=ids(), labels=ids()).loss)


def test_a_mapping_is_read_as_transformers_reads_it(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    batch = {"input_ids": ids(), "labels": ids()}
    batch["labels"][:, 4:9] = -100
    batch["attention_mask"] = torch.ones_like(ids())
    batch["attention_mask"][0, 15:] = 0
    wanted = model(**batch, use_cache=False).loss
    for vocabulary in (1, 10**9):
        found = causal_lm_loss(model, batch, chunk_from_vocab=vocabulary)
        torch.testing.assert_close(found, wanted)
    assert causal_lm_loss(model, {"input_ids": ids()}) == causal_lm_loss(model, ids())


def test_fp8_layers_and_an_fp8_head_take_the_chunked_way_too(tiny_model: ModelMaker) -> None:
    model = tiny_model(hidden=128)
    recipe = BlockScaling(gemm="float32")
    convert_to_float8_training(model, recipe, head=recipe)
    assert isinstance(model.get_output_embeddings(), Float8Linear)
    batch = ids(4, 65)
    losses = [causal_lm_loss(model, batch, chunk_from_vocab=v, chunk_tokens=128) for v in (1, 999)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("field", ["attention", "attention_mask"])
def test_documents_are_not_given_to_an_attention_that_would_mix_them(
    tiny_model: ModelMaker, field: str
) -> None:
    model = tiny_model()
    batch = {"input_ids": ids(), "position_ids": torch.arange(20).expand(3, 20)}
    if field == "attention":
        model.config._attn_implementation = "fancy"
    else:
        batch["attention_mask"] = torch.ones_like(ids())
    with pytest.raises(ValueError, match="would see each other; use sdpa"):
        causal_lm_loss(model, batch)


def test_flash_attention_gets_its_documents_in_one_row(tiny_model: ModelMaker) -> None:
    """The flash kernels read documents off position_ids only when there is one row."""
    model, seen = tiny_model(), {}

    def look(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise StopIteration

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.config._attn_implementation = "flash_attention_2"
    positions = torch.arange(20).expand(3, 20) % 7
    with pytest.raises(StopIteration):
        causal_lm_loss(model, {"input_ids": ids(), "position_ids": positions})
    assert torch.equal(seen["input_ids"], ids()[:, :-1].reshape(1, -1))
    assert torch.equal(seen["position_ids"], positions[:, :-1].reshape(1, -1))
