from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ModelMaker = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _tiny(
    architecture: str = "llama", *, tied: bool = False, hidden: int = 64, layers: int = 2
) -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 16,
        "intermediate_size": hidden * 5 // 2,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
    }
    if architecture == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    sizes["num_key_value_heads"] = 2
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes))
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=16, **sizes))
    if architecture == "mistral":
        return MistralForCausalLM(MistralConfig(**sizes))
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.fixture
def tiny_model() -> ModelMaker:
    """A maker of causal language models of bytes: same arguments, same weights."""
    return _tiny
