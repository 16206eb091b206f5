"""Which files a pivot may consist of, and which settings its config.json may have.

Libraries run code that a config names, and read settings that nobody meant to be set from outside
(CVE-2026-4372). So there is a list of what is known to be harmless, and nothing else passes.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

CONFIG_FILE: Final = "config.json"
MAX_CONFIG_BYTES: Final = 1 << 20
ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}
"""model_type -> the one class that it may name: classes of the library, by its own table."""
KEYS: Final = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_bias",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "dtype",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_dropout",
        "hidden_size",
        "id2label",
        "initializer_range",
        "intermediate_size",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "layer_norm_eps",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "return_dict",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "rotary_emb_base",
        "rotary_pct",
        "sliding_window",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_parallel_residual",
        "use_sliding_window",
        "vocab_size",
    }
)  # fmt: skip
FORBIDDEN: Final = frozenset({"auto_map", "trust_remote_code", "custom_pipelines"})
"""Keys that name code, refused in every small JSON file of a pivot."""
SMALL_JSON: Final = (
    CONFIG_FILE,
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
)
_FILE: Final = re.compile(
    r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.(json|jsonl|yaml|safetensors|md|txt|jinja|model)|SHA256SUMS|LICENSE|NOTICE"
)
_TEMPLATE: Final = re.compile(r"\{[{%#]")
_WORD: Final = re.compile(r"[A-Za-z0-9_.+-]{0,64}")


class ConfigRefusedError(ValueError):
    """A pivot's file or setting is none that is known to be harmless."""


def check_file_name(name: str) -> None:
    """Refuse what is no weights, settings, tokenizer or text. Raises: ConfigRefusedError."""
    if not _FILE.fullmatch(name):
        raise ConfigRefusedError(
            f"{name!r}: a pivot is made of .safetensors, .json, .jsonl, .yaml, .txt, .md, .jinja "
            "and .model files: leave it out"
        )


def check_small_json(name: str, raw: bytes) -> None:
    """Check one of SMALL_JSON, and the config itself by its list.

    Raises: ConfigRefusedError.
    """
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigRefusedError(f"{name}: {len(raw)} bytes, wanted at most {MAX_CONFIG_BYTES}")
    try:
        values = json.loads(raw, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ConfigRefusedError(f"{name}: no JSON that is to be believed ({error})") from None
    if not isinstance(values, dict):
        raise ConfigRefusedError(f"{name}: found no object")
    if name == CONFIG_FILE:
        _check_config(values)


def check_plain_yaml(name: str, raw: bytes) -> None:
    """Check that a YAML file is data: readers of task files run its tags and its templates.

    Raises: ConfigRefusedError.
    """
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigRefusedError(f"{name}: {len(raw)} bytes, wanted at most {MAX_CONFIG_BYTES}")
    try:
        for event in yaml.parse(raw.decode("utf-8")):
            if any(getattr(event, mark, None) for mark in ("tag", "anchor")):
                raise ConfigRefusedError(
                    f"{name}: holds a tag, an anchor or an alias: leave it out"
                )
            if isinstance(event, yaml.ScalarEvent) and _TEMPLATE.search(event.value):
                raise ConfigRefusedError(f"{name}: {event.value[:60]!r} is a template, no data")
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigRefusedError(f"{name}: no YAML that is to be believed ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    if named := sorted(found.keys() & FORBIDDEN):
        raise ValueError(f"{named[0]} names code, and code never travels")
    return found


def _check_config(values: dict[str, Any]) -> None:
    if unknown := sorted(values.keys() - KEYS):
        raise ConfigRefusedError(
            f"{CONFIG_FILE}: {', '.join(unknown)[:120]}: not among the settings that we know; "
            "leave them out"
        )
    kind = str(values.get("model_type"))
    if kind not in ARCHITECTURES or values.get("architectures") != [ARCHITECTURES[kind]]:
        found = f"{kind!r} {values.get('architectures')!r}"[:120]
        raise ConfigRefusedError(
            f"{CONFIG_FILE}: found {found}, wanted a model_type of {', '.join(ARCHITECTURES)} and "
            "its own class"
        )
    for word in _words(values):
        if not _WORD.fullmatch(word):
            raise ConfigRefusedError(f"{CONFIG_FILE}: {word[:60]!r} is no plain word")


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [word for pair in value.items() for item in pair for word in _words(item)]
    return [word for item in value for word in _words(item)] if isinstance(value, list) else []
