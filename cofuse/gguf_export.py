"""A pivot's folder as one GGUF file, for llama.cpp, Ollama and the like; with four bits for phones.

Loaded when a command needs it: it reads tensors with torch.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cofuse.gguf_file import F16, F32, Q4_0, Q8_0, GgufFile, TensorType, Value
from cofuse.gguf_tokenizer import GgufError, tokenizer_keys
from fusion.model_folder import ModelFolder, open_model

ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""model_type -> llama.cpp's name of the architecture."""
_TOP: Final[Mapping[str, str]] = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS: Final[Mapping[str, str]] = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_WHOLE: Final = ("token_embd.weight", "output.weight")
"""Where four bits cost most: they have eight."""
_FILE_TYPE: Final = {False: 1, True: 2}
Progress = Callable[[int, int], None]


def export_gguf(
    folder: Path, out: Path, *, int4: bool = False, on_progress: Progress = lambda _d, _t: None
) -> None:
    """Write a pivot as GGUF: float16, or four bits a weight.

    Args: out: a file; it appears whole or not at all. on_progress: tensors done, of how many.
    Raises: GgufError when llama.cpp would not compute what transformers computes; MergeError when
        the folder cannot be read.
    """
    model = open_model(folder)
    keys = model_keys(model, int4=int4) | tokenizer_keys(folder, _rows(model))
    names = {gguf_name(name): name for name in model.tensors if not _tied(model, name)}
    layout = {
        name: (model.tensors[own].shape, _type(name, model.tensors[own].shape, int4=int4))
        for name, own in names.items()
    }
    partial = out.with_name(out.name + ".partial")
    with GgufFile(partial, keys, layout) as file:
        for done, (name, own) in enumerate(names.items(), start=1):
            values = model.read(own).float().numpy()
            file.put(name, _turned(model.config, own, values))
            on_progress(done, len(names))
    partial.rename(out)


def model_keys(model: ModelFolder, *, int4: bool) -> dict[str, Value]:
    """What llama.cpp must know of the architecture. Raises: GgufError."""
    config = model.config
    name = ARCHITECTURES.get(str(config.get("model_type")), "")
    if not name:
        raise GgufError(
            f"{model.path}: found a {config.get('model_type')} model, and only "
            f"{', '.join(ARCHITECTURES)} can be written as GGUF here; use the folder as it is with "
            "transformers or vLLM"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    if kind != "default" or windowed:
        what = "a sliding window" if windowed else f"rotary positions of type {kind}"
        raise GgufError(f"{model.path}: has {what}, which is not written here: use it as it is")
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    values: dict[str, Value] = {
        "vocab_size": _rows(model),
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": int(config["hidden_size"]),
        "block_count": int(config["num_hidden_layers"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(theta),
    }
    general: dict[str, Value] = {
        "general.architecture": name,
        "general.name": model.path.resolve().name,
        "general.file_type": _FILE_TYPE[int4],
        "general.quantization_version": 2,
    }
    return general | {f"{name}.{key}": value for key, value in values.items()}


def gguf_name(name: str) -> str:
    """Llama.cpp's name of a tensor. Raises: GgufError for one that it does not have."""
    if name in _TOP:
        return _TOP[name]
    found = _LAYER.fullmatch(name)
    if found is None or found[2] not in _PARTS:
        raise GgufError(f"the tensor {name} has no place in GGUF: use the folder as it is")
    return f"blk.{found[1]}.{_PARTS[found[2]]}.{found[3]}"


def _turned(
    config: Mapping[str, Any], name: str, values: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Llama.cpp turns pairs of neighbours where transformers turns halves of a head: reorder rows.

    Only its `llama` does; for Qwen it turns halves too.
    """
    if ARCHITECTURES[config["model_type"]] != "llama":
        return values
    heads = int(config["num_attention_heads"])
    if ".k_proj." in name:
        heads = int(config.get("num_key_value_heads") or heads)
    elif ".q_proj." not in name:
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _type(name: str, shape: tuple[int, ...], *, int4: bool) -> TensorType:
    """Vectors stay whole; rows that are no multiple of a block stay float16."""
    if len(shape) == 1:
        return F32
    wanted = Q8_0 if name in _WHOLE else Q4_0
    return wanted if int4 and shape[-1] % wanted.block == 0 else F16


def _tied(model: ModelFolder, name: str) -> bool:
    return name == "lm_head.weight" and model.ties_head


def _rows(model: ModelFolder) -> int:
    return model.tensors["model.embed_tokens.weight"].shape[0]
