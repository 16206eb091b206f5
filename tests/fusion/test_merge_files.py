import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fp8 import BlockScaling, convert_to_float8_training, load_fp8, save_pretrained_fp8
from fp8.export import ExportError
from fusion import merge_files
from fusion.merge import MERGES, MergeError, MergeSettings, merge_tensor
from fusion.merge_files import REPORT_FILE, merge_directories
from fusion.model_folder import SafetensorsFile, open_model
from fusion.models import ModelSpec, build_model, load_model, save_model, train_tokenizer

METHODS = sorted(MERGES)
TEXT = ["the quick brown fox jumps over the lazy dog " * 3, "she sells sea shells " * 4]
State = dict[str, Tensor]


def tensors(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> State:
    make = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (16, 8), "layer.weight": (8, 8), "layer.bias": (8,), "scale": ()}
    state = {n: (scale * torch.randn(s, generator=make)).to(dtype) for n, s in shapes.items()}
    return state | {"steps": torch.tensor([3, 4]), "mask": torch.tensor([True, False])}


def write(folder: Path, state: State, files: int = 1, **config: Any) -> Path:
    """A model directory of these tensors, in one file or several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 16, **config}))
    if files == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {n: t for i, (n, t) in enumerate(sorted(state.items())) if i % files == number}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Path]]]:
    """A base and sources a, b, c, each a small change of it."""

    def made(
        dtype: torch.dtype = torch.float32, files: int = 1, count: int = 3, **config: Any
    ) -> tuple[Path, dict[str, Path]]:
        base = tensors(0, dtype)
        folder = write(tmp_path / "base", base, files, **config)
        sources = {}
        for seed, name in enumerate("abc"[:count], start=1):
            change = tensors(seed, torch.float32, 0.1)
            tuned = {
                n: (t.float() + change[n]).to(dtype) if t.is_floating_point() else t
                for n, t in base.items()
            }
            sources[name] = write(tmp_path / name, tuned, **config)  # always in one file
        return folder, sources

    return made


def read(folder: Path) -> State:
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def settings_for(method: str) -> MergeSettings:
    return MergeSettings(method=method)


# ------------------------------------------------------------------------------- the values
@pytest.mark.parametrize("method", METHODS)
def test_files_merge_as_tensors_in_memory_do(
    method: str, make: Callable[..., Any], tmp_path: Path
) -> None:
    base, sources = make(count=MERGES[method].sources or 3)
    fisher = None
    if method == "fisher":
        fisher = {}
        for name, seed in (("a", 7), ("b", 8), ("c", 9)):
            values = {n: t.abs() for n, t in tensors(seed).items() if t.is_floating_point()}
            fisher[name] = tmp_path / f"{name}.fisher"
            save_file(values, fisher[name])
    report = merge_directories(base, sources, tmp_path / "out", settings_for(method), fisher=fisher)
    start, found = read(base), read(tmp_path / "out")
    tuned = {name: read(path) for name, path in sources.items()}
    assert list(found) == list(start)
    for name, value in start.items():
        assert found[name].dtype == value.dtype
        if not value.is_floating_point():
            assert torch.equal(found[name], value)
            continue
        deltas = {who: (t[name] - value).numpy() for who, t in tuned.items()}
        known = (
            None if fisher is None else {w: load_file(f)[name].numpy() for w, f in fisher.items()}
        )
        change = merge_tensor(name, deltas, settings_for(method), fisher=known)
        wanted = torch.from_numpy(np.asarray(value.double().numpy() + change)).to(value.dtype)
        assert torch.equal(found[name], wanted), name
    assert report.path == tmp_path / "out"
    assert report.weights == settings_for(method).effective_weights(sorted(sources))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_bases_dtypes_files_and_companions_are_kept(
    dtype: torch.dtype, make: Callable[..., Any], tmp_path: Path
) -> None:
    base, sources = make(dtype, files=3)
    (base / "tokenizer_config.json").write_text('{"a": 1}')
    (base / "README.md").write_text("of the base")
    report = merge_directories(base, sources, tmp_path / "out", settings_for("linear"))
    found, start = read(tmp_path / "out"), read(base)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in start.items()
    }
    weights = [p.name for p in base.iterdir() if p.suffix == ".safetensors"]
    assert len(weights) == 3
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *weights,
        "config.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
        REPORT_FILE,
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    old = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == old["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    mean = sum(read(path)["layer.weight"].double() for path in sources.values()) / 3
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert (found["layer.weight"].double() - mean).abs().max() <= step * mean.abs().max()
    assert [t.merged for t in report.tensors if t.name in ("steps", "mask")] == [False, False]


def test_sources_that_are_the_base_give_the_base_bit_for_bit(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    base, _ = make(torch.bfloat16)
    for method in ("task_arithmetic", "dare_ties", "karcher", "wudi"):
        out = tmp_path / method
        merge_directories(base, {"a": base, "b": base}, out, settings_for(method))
        assert all(torch.equal(t, read(out)[n]) for n, t in read(base).items())


def test_the_same_call_gives_the_same_bytes_in_any_order(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    base, sources = make(torch.bfloat16)
    settings = MergeSettings(method="dare_ties", seed=5)
    turned = dict(reversed(sources.items()))
    for out, given in (("x", sources), ("y", turned)):
        merge_directories(base, given, tmp_path / out, settings)
    x, y = (tmp_path / out / "model.safetensors" for out in "xy")
    assert x.read_bytes() == y.read_bytes()
    assert (tmp_path / "x" / REPORT_FILE).read_text() == (tmp_path / "y" / REPORT_FILE).read_text()


# ------------------------------------------------------------------------------- the report
def test_the_report_tells_of_each_source_how_much_of_it_is_left(
    tmp_path: Path,
) -> None:
    base = write(tmp_path / "base", {"w": torch.zeros(4)})
    sources = {
        "a": write(tmp_path / "a", {"w": torch.tensor([3.0, 4.0, 0.0, 0.0])}),
        "b": write(tmp_path / "b", {"w": torch.tensor([-1.0, 4.0, 0.0, 2.0])}),
    }
    settings = MergeSettings(method="linear", weights={"a": 0.1, "b": 1.0})
    report = merge_directories(base, sources, tmp_path / "out", settings, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.draft"))
    assert report.path is None
    assert report.weights == {"a": 0.1, "b": 1.0}
    merged = np.asarray([-0.7, 4.4, 0.0, 2.0])
    a = report.sources()["a"]
    assert a.norm == pytest.approx(5.0)
    assert a.cosine == pytest.approx((4 * 4.4 - 2.1) / 5 / np.linalg.norm(merged))
    assert (a.signed, a.agreeing, a.sign_share) == (2, 1, 0.5)
    assert report.sources()["b"].sign_share == 1.0
    described = json.loads(json.dumps(report.described()))
    assert described["sources"]["a"]["effective_weight"] == 0.1
    written = merge_directories(base, sources, tmp_path / "out", settings)
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text()) == described
    assert written.described() == described


def test_progress_counts_every_tensor(make: Callable[..., Any], tmp_path: Path) -> None:
    base, sources = make(files=2)
    told: list[tuple[int, int, str]] = []
    merge_directories(
        base,
        sources,
        tmp_path / "out",
        settings_for("linear"),
        on_progress=lambda done, total, name: told.append((done, total, name)),
    )
    assert [done for done, _, _ in told] == list(range(1, 7))
    assert {name for _, _, name in told} == set(read(base))


# ------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "model_stock"])
def test_of_a_model_one_tensor_a_source_is_held(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {f"layer.{i}.weight": torch.ones(4, 4) * i for i in range(20)}
    base = write(tmp_path / "base", many)
    sources = {n: write(tmp_path / n, {k: v + 1 for k, v in many.items()}) for n in "abc"}
    alive: list[weakref.ref[Any]] = []
    most = 0
    original = merge_files._values

    def counted(*given: Any) -> Any:
        nonlocal most
        values = original(*given)
        alive.append(weakref.ref(values))
        most = max(most, sum(ref() is not None for ref in alive))
        return values

    monkeypatch.setattr(merge_files, "_values", counted)
    merge_directories(base, sources, tmp_path / "out", settings_for(method))
    assert len(alive) == 20 * 4
    assert most == 4  # the base's and three sources', of one tensor


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "breadcrumbs", "karcher"])
def test_memory_is_that_of_the_largest_tensor_not_of_the_model(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tracemalloc

    rows = 1024
    monkeypatch.setattr("fusion.merge_methods.STRETCH", 1 << 12)
    monkeypatch.setattr("fusion.merge_angles.STRETCH", 1 << 12)
    monkeypatch.setattr("fusion.merge_report.STRETCH", 1 << 12)
    shapes = {"big.weight": (rows, 256), **{f"{i}.weight": (rows // 2, 256) for i in range(8)}}
    sizes = {n: torch.randn(s, generator=torch.Generator()) for n, s in shapes.items()}
    base = write(tmp_path / "base", sizes)
    sources = {n: write(tmp_path / n, {k: v * 1.1 for k, v in sizes.items()}) for n in "ab"}
    tracemalloc.start()
    merge_directories(base, sources, tmp_path / "out", settings_for(method))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    big = rows * 256 * 4
    # Base and two deltas in fp32, the result in fp64, half a tensor for ranks or checks.
    assert peak <= 5.75 * big, peak / big
    assert peak < sum(t.nbytes for t in sizes.values()) * 3 / 2


# ------------------------------------------------------------------------------- real models
SPEC = ModelSpec(architecture="llama", hidden_size=128, layers=1, heads=4, vocab_size=300)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXT, 300)


def test_a_merged_directory_loads_as_the_model_it_is(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for seed in range(3):
        save_model(build_model(SPEC, seed), tokenizer, tmp_path / str(seed))
    sources = {"a": tmp_path / "1", "b": tmp_path / "2"}
    merge_directories(tmp_path / "0", sources, tmp_path / "out", settings_for("linear"))
    model, read_back = load_model(tmp_path / "out")
    a, b = (dict(build_model(SPEC, seed).named_parameters()) for seed in (1, 2))
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, (a[name] + b[name]) / 2, atol=1e-6)
    assert read_back.get_vocab() == tokenizer.get_vocab()


def test_fp8_sources_count_as_what_they_stand_for(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain, coded = build_model(SPEC, 0), build_model(SPEC, 1)
    save_model(plain, tokenizer, tmp_path / "base")
    convert_to_float8_training(coded, BlockScaling())
    export = save_pretrained_fp8(coded, tmp_path / "a", tokenizer)
    assert export.fp8
    one = MergeSettings(method="linear", weight=1.0)
    merge_directories(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", one)
    found, wanted = read(tmp_path / "out"), load_fp8(tmp_path / "a")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, wanted[name].float(), atol=1e-7)


@pytest.mark.parametrize("fp8", [False, True])
def test_an_fp8_base_is_written_plain_or_in_fp8_again(
    fp8: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for seed, name in ((0, "base"), (1, "a")):
        model = build_model(SPEC, seed)
        convert_to_float8_training(model, BlockScaling())
        save_pretrained_fp8(model, tmp_path / name, tokenizer)
    one, out = MergeSettings(method="linear", weight=1.0), tmp_path / "out"
    report = merge_directories(tmp_path / "base", {"a": tmp_path / "a"}, out, one, fp8=fp8)
    config = json.loads((out / "config.json").read_text())
    assert ("quantization_config" in config) == fp8
    wanted = load_fp8(tmp_path / "a")
    # What was FP8 before is coded to the same values again: its scales are powers of two.
    found = load_fp8(out) if fp8 else read(out)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.allclose(value.float(), wanted[name].float(), atol=1e-6), name
        assert fp8 or value.dtype == torch.bfloat16
    model, _ = load_model(out)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert {t.dtype for t in report.tensors} == ({"F8_E4M3", "BF16"} if fp8 else {"BF16"})


def test_a_head_stored_on_one_side_only_is_fine_where_configs_tie_it(tmp_path: Path) -> None:
    def tied(seed: int, head: bool) -> State:
        state = tensors(seed)
        return state | ({"lm_head.weight": state["embed.weight"].clone()} if head else {})

    settings = MergeSettings(method="dare_linear", seed=1)
    for head_of_base in (True, False):
        at = tmp_path / str(head_of_base)
        base = write(at / "base", tied(0, head_of_base), tie_word_embeddings=True)
        sources = {
            n: write(at / n, tied(seed, not head_of_base), tie_word_embeddings=True)
            for seed, n in ((1, "a"), (2, "b"))
        }
        report = merge_directories(base, sources, at / "out", settings)
        found = read(at / "out")
        assert ("lm_head.weight" in found) == head_of_base
        if head_of_base:  # what is dropped at random is dropped in both
            assert torch.equal(found["lm_head.weight"], found["embed.weight"])
        else:
            assert "lm_head.weight of a is left out" in report.notes[0]
    base = write(tmp_path / "base", tied(0, True))
    source = write(tmp_path / "a", tied(1, False))
    with pytest.raises(MergeError, match=r"1 missing: lm_head\.weight"):
        merge_directories(base, {"a": source}, tmp_path / "out", settings)


# ------------------------------------------------------------------------------- refusals
def refused(
    base: Path, sources: dict[str, Path], says: str, method: str = "linear", **given: Any
) -> None:
    out = base.parent / "out"
    before = sorted(base.parent.iterdir())
    with pytest.raises((MergeError, ExportError), match=says):
        merge_directories(base, sources, out, settings_for(method), **given)
    assert sorted(base.parent.iterdir()) == before


def test_all_that_is_missing_extra_or_of_another_shape_is_named(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    base, sources = make()
    state = read(sources["b"])
    del state["layer.bias"]
    state |= {"other.bias": torch.zeros(2), "layer.weight": torch.zeros(8, 9)}
    sources["b"] = write(tmp_path / "odd", state)
    refused(
        base,
        sources,
        r"b is not of .* 1 missing: layer\.bias; 1 extra: other\.bias; 1 of another shape: "
        r"layer\.weight \(layer\.weight: \(8, 9\), wanted \(8, 8\)\)",
    )


def test_a_padded_vocabulary_is_refused_with_the_tokenizers(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    base, sources = make()
    state = read(sources["a"]) | {"embed.weight": torch.zeros(24, 8)}
    sources["a"] = write(tmp_path / "padded", state)
    refused(base, sources, r"embed\.weight has 24 rows in a and 16 .*tokenizers in .*padded and")


def test_another_tokenizer_is_refused_even_of_the_same_size(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    base, sources = make()
    for folder, vocab in ((base, {"x": 0, "y": 1}), (sources["b"], {"y": 0, "x": 1})):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    refused(base, sources, r"tokenizers differ: .*'x' is id 0 in the one, 1 in the other")
    unigram = {"model": {"vocab": [["x", -1.0]]}, "added_tokens": [{"content": "y", "id": 1}]}
    (sources["b"] / "tokenizer.json").write_text(json.dumps(unigram))
    merge_directories(base, sources, tmp_path / "out", settings_for("linear"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_refused_with_its_tensor_and_source(
    value: float, make: Callable[..., Any], tmp_path: Path
) -> None:
    base, sources = make()
    state = read(sources["c"])
    state["layer.bias"][3] = value
    sources["c"] = write(tmp_path / "broken", state)
    refused(base, sources, r"layer\.bias of c holds NaN or infinity")


def test_a_sum_beyond_the_dtype_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"w": torch.full((2,), 6e4, dtype=torch.float16)})
    source = write(tmp_path / "a", {"w": torch.full((2,), 5e4, dtype=torch.float16)})
    settings = MergeSettings(method="linear", weight=-2.0)
    with pytest.raises(MergeError, match="w leaves the range of F16"):
        merge_directories(base, {"a": source}, tmp_path / "out", settings)


def test_damaged_and_foreign_directories_are_refused(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    base, sources = make()
    refused(base, {"a": tmp_path / "none"}, r"none.config\.json: no such file")
    refused(base, {}, "got 0 deltas")
    file = sources["a"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    refused(base, sources, r"a.model\.safetensors is damaged")
    gptq = write(tmp_path / "gptq", tensors(1), quantization_config={"quant_method": "gptq"})
    refused(base, {"a": gptq}, "wanted no quantization")
    split = write(tmp_path / "split", tensors(1), files=2)
    index = split / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    refused(base, {"a": split}, "differ in .'more'")
    content["weight_map"]["more"] = "../x.safetensors"
    index.write_text(json.dumps(content))
    refused(base, {"a": split}, "outside its directory")


def test_fisher_information_must_fit_too(make: Callable[..., Any], tmp_path: Path) -> None:
    base, sources = make(count=2)
    known = {n: t.abs() for n, t in tensors(5).items() if t.is_floating_point()}
    save_file(known, tmp_path / "full")
    known.pop("scale")
    save_file(known, tmp_path / "part")
    full, part = tmp_path / "full", tmp_path / "part"
    refused(base, sources, "goes with method fisher", fisher={"a": full, "b": full})
    refused(base, sources, "goes with method fisher", method="fisher")
    refused(base, sources, r"differ in \['b'\]", method="fisher", fisher={"a": full})
    refused(
        base,
        sources,
        "Fisher information of b .* 1 missing: scale",
        method="fisher",
        fisher={"a": full, "b": part},
    )


def test_fp8_again_needs_a_base_in_fp8_and_a_taken_name_is_refused(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    base, sources = make()
    refused(base, sources, "is not block-FP8", fp8=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("mine")
    refused(base, sources, "out exists")


def test_a_kill_on_the_way_leaves_nothing_of_that_name_and_the_next_call_all(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    base, sources = make(files=2)
    out, child = tmp_path / "out", os.fork()
    if not child:
        merge_directories(
            base,
            sources,
            out,
            settings_for("linear"),
            on_progress=lambda done, _total, _name: os._exit(9) if done == 4 else None,
        )
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert not out.exists()
    merge_directories(base, sources, out, settings_for("linear"))
    assert not list(tmp_path.glob("*.draft"))
    assert read(out).keys() == read(base).keys()


def test_tensors_of_every_type_and_order_come_back_as_they_were(tmp_path: Path) -> None:
    given = {
        "i8": torch.tensor([1, -2, 3], dtype=torch.int8),
        "f64": torch.tensor([[1.5]], dtype=torch.float64),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    names = {"i8": "I8", "f64": "F64", "bf16": "BF16", "bool": "BOOL"}
    layout = {n: (names.get(n, "F32"), tuple(t.shape)) for n, t in given.items()}
    with SafetensorsFile(tmp_path / "model.safetensors", layout) as file:
        for name, tensor in given.items():
            file.put(name, tensor)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    (tmp_path / "config.json").write_text("{}")
    assert set(open_model(tmp_path).tensors) == set(given)
