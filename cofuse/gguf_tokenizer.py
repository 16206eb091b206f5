"""A tokenizer as llama.cpp keeps it, for the families whose splitting rules it knows by name.

llama.cpp has no general pre-tokenizer: each rule is code of its own under a name. A tokenizer whose
rules are not exactly those would answer with other tokens than the model was trained on, so it is
refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cofuse.gguf_file import Value

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_TAIL: Final = (
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHORT: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
FAMILIES: Final[Mapping[str, str]] = {
    _SHORT + _TAIL % "": "qwen2",
    _SHORT + _TAIL % "{1,3}": "llama-bpe",
}
"""Splitting rule -> llama.cpp's name for it; GPT-2's own rule has none in tokenizer.json."""
GPT2: Final = "gpt-2"


class GgufError(ValueError):
    """A pivot cannot be told in GGUF; the message says why and what else there is."""


def tokenizer_keys(folder: Path, vocab_size: int) -> dict[str, Value]:
    """The keys of a folder's tokenizer.json.

    Args: vocab_size: rows of the embedding; ids that have no token are filled up.
    Raises: GgufError when llama.cpp would split a text otherwise.
    """
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = _optional(folder / "tokenizer_config.json")
    family, model = _family(spec), spec["model"]
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[index], kinds[index] = token, NORMAL
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    ids = {token: index for index, token in enumerate(tokens)}
    eos = ids.get(_name(config.get("eos_token")))
    if eos is None:
        raise GgufError(f"{folder}: the tokenizer has no end token: set eos_token")
    bos = ids.get(_name(config.get("bos_token")))
    keys: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": family,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [
            m if isinstance(m, str) else " ".join(m) for m in model["merges"]
        ],
        "tokenizer.ggml.eos_token_id": eos,
        # Unsaid, llama.cpp would take GPT-2's own id 11.
        "tokenizer.ggml.bos_token_id": eos if bos is None else bos,
        "tokenizer.ggml.add_bos_token": _begins(spec.get("post_processor")),
    }
    template = folder / "chat_template.jinja"
    if template.exists():
        keys["tokenizer.chat_template"] = template.read_text(encoding="utf-8")
    return keys


def _begins(step: Mapping[str, Any] | None) -> bool:
    """Whether a special token is put before a text."""
    if step is None:
        return False
    if step["type"] == "Sequence":
        return any(_begins(part) for part in step["processors"])
    return step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]


def _family(spec: Mapping[str, Any]) -> str:
    """Llama.cpp's name of the rules by which a text is split. Raises: GgufError."""
    kind = spec["model"]["type"]
    if kind != "BPE" or spec["model"].get("byte_fallback"):
        raise _unknown(f"it is a {kind} tokenizer of SentencePiece's kind")
    if spec["model"].get("ignore_merges") and _split(spec) != _SHORT + _TAIL % "{1,3}":
        raise _unknown("it prefers whole words to merges")
    if (normalizer := spec.get("normalizer")) is not None and normalizer["type"] != "NFC":
        raise _unknown(f"it rewrites texts first ({normalizer['type']})")
    rule = _split(spec)
    if rule != GPT2 and rule not in FAMILIES:
        raise _unknown(f"it splits texts by a rule of its own ({rule[:60]!r})")
    return GPT2 if rule == GPT2 else FAMILIES[rule]


def _split(spec: Mapping[str, Any]) -> str:
    """The splitting rule; GPT2 for the one that ByteLevel has built in. Raises: GgufError."""
    steps = spec.get("pre_tokenizer") or {"type": "none"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _unknown("it is no byte-level one without a prefixed space")
    if len(steps) == 1 and last["use_regex"]:
        return GPT2
    first = steps[0]
    alone = (first.get("behavior"), first.get("invert")) == ("Isolated", False)
    if len(steps) == 2 and first["type"] == "Split" and alone and not last["use_regex"]:
        return str(first["pattern"].get("Regex", ""))
    raise _unknown("it splits texts in several steps")


def _unknown(why: str) -> GgufError:
    return GgufError(
        f"llama.cpp does not know this tokenizer's rules, and would read texts otherwise: {why}; "
        "use the folder as it is with transformers or vLLM"
    )


def _name(token: Any) -> str:
    """A special token's text: configs hold it plain or as an object."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _optional(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found
