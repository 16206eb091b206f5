"""A pivot's settings pass by a list; nothing in them names code, a place or a secret setting."""

import json
from typing import Any

import pytest

from fusion.models import ModelSpec, build_model
from trust.model_config import (
    ARCHITECTURES,
    MAX_CONFIG_BYTES,
    ConfigRefusedError,
    check_file_name,
    check_plain_yaml,
    check_small_json,
)

GOOD: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def config(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_what_our_own_models_say_passes(architecture: Any) -> None:
    spec = ModelSpec(architecture=architecture, hidden_size=32, layers=1, heads=2, vocab_size=300)
    model = build_model(spec, 0)
    model.config.architectures = [type(model).__name__]
    for diff in (True, False):
        raw = json.loads(model.config.to_json_string(use_diff=diff))
        check_small_json("config.json", json.dumps(raw).encode())


@pytest.mark.parametrize(
    "raw",
    [
        config(auto_map={"AutoModelForCausalLM": "model.Model"}),
        config(rope_parameters={"deep": [{"auto_map": {}}]}),
        config(trust_remote_code=True),
        config(_attn_implementation_internal="kernels/evil"),
        config(attn_implementation="evil"),
        config(quantization_config={"quant_method": "x", "modules": "/tmp/x"}),
        config(hidden_act="../../x"),
        config(hidden_act="http://x"),
        config(model_type="evil"),
        config(model_type=["llama"]),
        config(model_type="llama", architectures=["EvilModel"]),
        config(architectures=[]),
        config(hidden_size=0).replace(b'"hidden_size": 0', b'"hidden_size": 0, "hidden_size": 1'),
        b"[" * 100_000,
        b"[]",
        b"\xff",
        b"",
        config(hidden_act="x" * MAX_CONFIG_BYTES),
    ],
)
def test_everything_else_is_refused(raw: bytes) -> None:
    with pytest.raises(ConfigRefusedError, match=r"config\.json"):
        check_small_json("config.json", raw)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_code_is_named_nowhere(name: str) -> None:
    check_small_json(name, json.dumps({"eos_token": "</s>", "anything": [1.5]}).encode())
    with pytest.raises(ConfigRefusedError, match="names code"):
        check_small_json(name, json.dumps({"a": {"auto_map": []}}).encode())


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "config.json", "README.md", "SHA256SUMS", "vocab.txt"),
        *("round.yaml", "cofuse_heart_text.jsonl"),
    ],
)
def test_weights_settings_and_words_may_be_in_a_pivot(name: str) -> None:
    check_file_name(name)


@pytest.mark.parametrize(
    "name", ["modeling.py", "model.bin", "x.pkl", "run.sh", "a/b.json", "..json", ".json", "x.pt"]
)
def test_nothing_that_runs_may_be_in_a_pivot(name: str) -> None:
    with pytest.raises(ConfigRefusedError, match="leave it out"):
        check_file_name(name)


@pytest.mark.parametrize(
    "raw",
    [
        b"a: !function os.system",
        b"a: !!python/object/apply:os.system [ls]",
        b"a: &x [1]\nb: *x",
        b"doc_to_text: '{{ cycler.__init__ }}'",
        b'doc_to_text: "\\x7b{ x }}"',
        b"doc_to_text: |\n  {% for x in y %}",
        b"a: [",
        b"\xff",
        b"a: " + b"x" * MAX_CONFIG_BYTES,
    ],
)
def test_yaml_that_a_reader_would_run_is_refused(raw: bytes) -> None:
    """Readers of task files import what a tag names, and fill in templates outside a sandbox."""
    check_plain_yaml("task.yaml", b"task: x\nmetric_list: [{metric: bits_per_byte}]\n")
    with pytest.raises(ConfigRefusedError, match=r"task\.yaml"):
        check_plain_yaml("task.yaml", raw)


def test_each_architecture_names_a_class_of_the_library() -> None:
    import transformers

    assert all(hasattr(transformers, name) for name in ARCHITECTURES.values())
