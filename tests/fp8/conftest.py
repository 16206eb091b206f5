from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ModelMaker = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _tiny(architecture: str = "llama", *, tied: bool = False, hidden: int = 64) -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": hidden // 16,
        "intermediate_size": hidden * 5 // 2,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
    }
    if architecture == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **sizes))
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes))


@pytest.fixture
def tiny_model() -> ModelMaker:
    """A maker of causal language models of bytes: same arguments, same weights."""
    return _tiny
