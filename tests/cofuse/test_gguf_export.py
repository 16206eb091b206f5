"""A pivot as GGUF: what is read back is the model, and what llama.cpp would misread is refused."""

import json
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cofuse.gguf_export import export_gguf
from cofuse.gguf_file import F32, GgufFile, quantize_q4_0, quantize_q8_0
from cofuse.gguf_tokenizer import FAMILIES, GgufError, tokenizer_keys
from fusion.models import load_model, save_model
from tests.coordinator.finished_pivot import tiny_model

Read = tuple[dict[str, Any], dict[str, NDArray[np.float32]]]


def restore(raw: bytes, kind: int, count: int) -> NDArray[np.float32]:
    """Values of a tensor, by the rules of ggml's own types."""
    if kind in (0, 1):
        return np.frombuffer(raw, "<f4" if kind == 0 else "<f2", count).astype(np.float32)
    blocks = np.frombuffer(raw, np.uint8).reshape(count // 32, -1)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == 8:
        return (scale * blocks[:, 2:].view(np.int8)).reshape(-1)
    low, high = blocks[:, 2:] & 15, blocks[:, 2:] >> 4
    return (scale * (np.concatenate([low, high], axis=1).astype(np.float32) - 8)).reshape(-1)


_SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34)}
_NUMBERS = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}


def _take(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _text(file: BinaryIO) -> str:
    return file.read(_take(file, "<Q")).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _text(file)
    if kind == 9:
        inner, count = _take(file, "<I"), _take(file, "<Q")
        return [_value(file, inner) for _ in range(count)]
    return _take(file, _NUMBERS[kind])


def read_gguf(path: Path) -> Read:
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
        assert _take(file, "<I") == 3
        tensors, count = _take(file, "<Q"), _take(file, "<Q")
        keys = {_text(file): _value(file, _take(file, "<I")) for _ in range(count)}
        places = {}
        for _ in range(tensors):
            name = _text(file)
            shape = [_take(file, "<Q") for _ in range(_take(file, "<I"))][::-1]
            places[name] = (shape, _take(file, "<I"), _take(file, "<Q"))
        start, found = -(-file.tell() // 32) * 32, {}
        for name, (shape, kind, offset) in places.items():
            assert offset % 32 == 0
            block, size = _SIZES[kind]
            count = math.prod(shape)
            file.seek(start + offset)
            found[name] = restore(file.read(count // block * size), kind, count).reshape(shape)
    return keys, found


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with two heads of queries to one of keys, and a head of its own."""
    folder = tiny_model(tmp_path_factory.mktemp("g") / "model", width=64)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 4, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, eos_token_id=0, bos_token_id=0, rms_norm_eps=1e-6,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), tokenizer, folder)
    return folder


def test_every_weight_is_there_and_the_heads_rows_are_in_llamas_order(
    grouped: Path, tmp_path: Path
) -> None:
    export_gguf(grouped, tmp_path / "x.gguf")
    keys, found = read_gguf(tmp_path / "x.gguf")
    weights = load_model(grouped)[0].state_dict()
    assert len(found) == len(weights)
    gate = weights["model.layers.1.mlp.gate_proj.weight"].numpy()
    assert found["blk.1.ffn_gate.weight"] == pytest.approx(gate, abs=1e-4)
    assert found["output.weight"].shape == (304, 64)
    # Rows 2i and 2i + 1 of a head are turned together; here they stand half a head apart.
    key = weights["model.layers.0.self_attn.k_proj.weight"].numpy()
    for head in (0, 1):
        own = found["blk.0.attn_k.weight"][16 * head : 16 * (head + 1)]
        assert own[0::2] == pytest.approx(key[16 * head : 16 * head + 8], abs=1e-4)
        assert own[1::2] == pytest.approx(key[16 * head + 8 : 16 * head + 16], abs=1e-4)
    assert keys["general.architecture"] == "llama"
    assert (keys["llama.attention.head_count"], keys["llama.attention.head_count_kv"]) == (4, 2)
    assert keys["tokenizer.ggml.tokens"][-4:] == [f"[PAD{n}]" for n in range(300, 304)]
    assert keys["tokenizer.ggml.token_type"][0] == 3
    assert keys["tokenizer.ggml.pre"] == "gpt-2"


def test_four_bits_take_a_quarter_and_stay_near(grouped: Path, tmp_path: Path) -> None:
    export_gguf(grouped, tmp_path / "a.gguf")
    export_gguf(grouped, tmp_path / "b.gguf", int4=True)
    (_, whole), (_, small) = (read_gguf(tmp_path / f"{name}.gguf") for name in "ab")
    for name, values in whole.items():
        worst = {1: 0.0}.get(values.ndim, np.abs(values).max() / 8 + 1e-3)
        assert np.abs(small[name] - values).max() <= worst
    up = "blk.0.ffn_up.weight"
    assert len(quantize_q4_0(whole[up])) * 8 == 4.5 * whole[up].size


@given(st.lists(st.floats(-100, 100, width=32), min_size=32, max_size=32))
def test_a_quantised_block_is_restored_to_within_a_step(values: list[float]) -> None:
    block = np.asarray(values, np.float32)
    most = float(np.abs(block).max())
    near = 2e-3 * most + 1e-5  # of the scale itself, in float16
    assert np.abs(restore(quantize_q4_0(block), 2, 32) - block).max() <= most / 8 + near
    assert np.abs(restore(quantize_q8_0(block), 8, 32) - block).max() <= most / 254 + near


def _changed(folder: Path, tmp_path: Path, change: Any) -> Path:
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    return tmp_path


def _split(rule: str) -> dict[str, Any]:
    parts = [
        {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": parts}


@pytest.mark.parametrize(("rule", "name"), FAMILIES.items())
def test_the_makers_rules_are_known_by_name(
    grouped: Path, tmp_path: Path, rule: str, name: str
) -> None:
    folder = _changed(grouped, tmp_path, lambda s: s.update(pre_tokenizer=_split(rule)))
    assert tokenizer_keys(folder, 304)["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(pre_tokenizer=_split(r"\d")), "a rule of its own"),
        (lambda s: s.update(pre_tokenizer={"type": "Metaspace"}), "no byte-level"),
        (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "prefixed space"),
        (lambda s: s.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda s: s["model"].update(type="Unigram"), "Unigram"),
        (lambda s: s["model"].update(ignore_merges=True), "whole words"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_misread_is_refused(
    grouped: Path, tmp_path: Path, change: Any, says: str
) -> None:
    with pytest.raises(GgufError, match=says):
        tokenizer_keys(_changed(grouped, tmp_path, change), 304)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "yarn"),
        ({"sliding_window": 32}, "sliding window"),
    ],
)
def test_an_architecture_that_would_compute_otherwise_is_refused(
    grouped: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    for path in grouped.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((grouped / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(GgufError, match=says):
        export_gguf(tmp_path, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x.gguf*"))


def test_tensors_come_in_the_order_in_which_they_were_announced(tmp_path: Path) -> None:
    layout = {"a": ((2,), F32), "b": ((3,), F32)}
    with (
        GgufFile(tmp_path / "x", {}, layout) as file,
        pytest.raises(ValueError, match="announced"),
    ):
        file.put("b", np.zeros(3, np.float32))
