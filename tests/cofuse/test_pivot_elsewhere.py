"""Programs of others answer from a pivot as transformers does: llama.cpp, and an OpenAI client."""

import json
import os
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cofuse.gguf_export import export_gguf
from cofuse.gguf_file import quantize_q4_0, quantize_q8_0
from fusion.models import load_model, save_model
from tests.cofuse.test_gguf_export import restore
from tests.coordinator.finished_pivot import finished_pivot, tiny_model
from tests.own_python import python_with

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROMPT = "Code I2.9 is infarction"
_LLAMA_CPP = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
asked = {"prompt": sys.argv[2], "n_predict": 1, "temperature": 0, "n_probs": 300, "logprobs": 300}
found = xllamacpp.Server(params).handle_completions(asked)
(token,) = found["choices"][0]["logprobs"]["content"]
print(json.dumps({row["id"]: row["logprob"] for row in token["top_logprobs"]}))
"""


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return python_with(tmp_path_factory.mktemp("llama-cpp"), "xllamacpp")


def qwen3(folder: Path) -> Path:
    """A model that norms queries and keys, with heads wider than its own width gives."""
    tiny_model(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
        eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    save_model(Qwen3ForCausalLM(config), tokenizer, folder)
    return folder


def next_logprobs(folder: Path, *, int4: bool) -> torch.Tensor:
    """Of the token after PROMPT; with the weights as four bits leave them."""
    model, tokenizer = load_model(folder)
    if int4:
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                whole = "embed" in name or "lm_head" in name
                pack, kind = (quantize_q8_0, 8) if whole else (quantize_q4_0, 2)
                values = weight.detach().numpy()
                found = restore(pack(np.ascontiguousarray(values)), kind, values.size)
                weight.data = torch.from_numpy(found.reshape(values.shape).copy())
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        logprobs: torch.Tensor = model(ids).logits[0, -1].log_softmax(-1)
    return logprobs


@pytest.mark.parametrize(("int4", "near"), [(False, 0.01), (True, 0.1)])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_computes_what_transformers_does(
    tmp_path: Path, llama_cpp: Path, kind: Any, int4: bool, near: float
) -> None:
    """Four bits: up to the activations, which llama.cpp rounds to eight."""
    folder = tmp_path / "model"
    _ = qwen3(folder) if kind == "qwen3" else tiny_model(folder, kind, 64)
    export_gguf(folder, tmp_path / "x.gguf", int4=int4)
    words = [str(llama_cpp), "-c", _LLAMA_CPP, str(tmp_path / "x.gguf"), PROMPT]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    wanted = next_logprobs(folder, int4=int4)
    assert len(found) == len(wanted)
    for token, value in found.items():
        assert float(wanted[int(token)]) == pytest.approx(value, abs=near)


def test_an_openai_client_gets_answers_from_a_served_pivot(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    python = python_with(tmp_path_factory.mktemp("serving"), "openai")
    pivot = finished_pivot(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    root = str(Path(__file__).parents[2])
    server = subprocess.Popen(
        [str(python), "-m", "cofuse.cli", "pivot", "serve", str(pivot), "--port", str(port)],
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if "Uvicorn running" in line:
                break
        assert "Uvicorn running" in said[-1], "".join(said)
        address = f"http://localhost:{port}/v1"
        body = {"model": str(pivot), "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            f"{address}/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["choices"][0]["text"]
        with urllib.request.urlopen(f"{address}/models", timeout=60) as answer:
            assert "data" in json.load(answer)
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(60)
