"""Sampling: what a text may hang on, where it ends, and what it may consist of."""

import itertools
from collections import Counter
from typing import Any, get_args

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fusion import sampling as drawing
from fusion.byte_tables import byte_table
from fusion.generate import GenerateError, complete, on_policy_prompts
from fusion.models import (
    Architecture,
    ModelSpec,
    build_model,
    encode_text,
    train_tokenizer,
)
from tests.fusion import families

TEXTS = ["Code I63.9 is cerebral infarction.", "Neoplasm of breast, caf\u00e9 \u2603."] * 5
TOKENIZER = train_tokenizer(TEXTS, 300)
TABLE = byte_table(TOKENIZER, len(TOKENIZER)).pieces
PROMPTS = ["", "Code", "Code I63.9 is cerebral inf", "Neoplasm of breast, caf\u00e9", "Code"]
CONTEXT = 48


def model(architecture: Architecture = "llama", *, ascii_only: bool = True) -> PreTrainedModel:
    """A random model; of ascii ids only, so that no text is cut for its bytes."""
    spec = ModelSpec(
        architecture=architecture,
        hidden_size=32,
        layers=2,
        heads=2,
        vocab_size=len(TOKENIZER),
        context=CONTEXT,
    )
    net = build_model(spec, 0).double()
    net.config.tie_word_embeddings = False
    head = torch.nn.Linear(32, len(TOKENIZER), dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(
            torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1))
        )
        head.bias.zero_()
        if ascii_only:
            head.bias[[i for i, piece in enumerate(TABLE) if not piece.isascii()]] = -1e4
        head.bias[0] = 2.0
    net.set_output_embeddings(head)
    return net


def gpt2() -> PreTrainedModel:
    """A model that is none of ours, and whose positions are not relative."""
    config = GPT2Config(
        vocab_size=len(TOKENIZER),
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net: PreTrainedModel = GPT2LMHeadModel(config).double().eval()
    return net


def write(net: PreTrainedModel, prompts: list[str], **changed: Any) -> list[str]:
    wanted: dict[str, Any] = {
        "max_new_tokens": 20,
        "temperature": 1.0,
        "seed": 7,
        "batch_size": 8,
    }
    return complete(net, TOKENIZER, prompts, **(wanted | changed))


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_a_text_hangs_on_its_prompt_and_the_seed_and_on_no_other_row(
    architecture: Architecture,
) -> None:
    net = model(architecture)
    together = write(net, PROMPTS)
    assert len(set(together)) == len(PROMPTS), "a prompt given twice has two texts"
    assert write(net, PROMPTS) == together
    for size in (1, 2, 3):
        assert write(net, PROMPTS, batch_size=size) == together
    for order in itertools.permutations(range(3)):
        assert write(net, [PROMPTS[i] for i in order]) == [together[i] for i in order]
    assert write(net, PROMPTS[:2]) == together[:2]
    assert not set(write(net, PROMPTS[2:4], seed=8)) & set(together)


@pytest.mark.parametrize("architecture", [*get_args(Architecture), "gpt2"])
def test_padding_the_cache_and_dropped_rows_change_no_logit(
    architecture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = gpt2() if architecture == "gpt2" else model(architecture)
    seen: list[tuple[list[int], torch.Tensor]] = []
    sizes: list[int] = []
    draw = drawing.draw

    def noted(logits_BV: torch.Tensor, rows: list[Any], sampling: Any) -> Any:
        live = [(row, logits) for row, logits in zip(rows, logits_BV, strict=True) if not row.done]
        seen.extend(([*row.ids, *row.written], logits) for row, logits in live)
        sizes.append(len(rows))
        drawn, logprobs = draw(logits_BV, rows, sampling)
        drawn[[row.index % 3 == 0 and len(row.written) == 3 for row in rows]] = 0  # these end
        return drawn, logprobs

    monkeypatch.setattr(drawing, "draw", noted)
    write(net, PROMPTS * 3, batch_size=15)
    assert sizes[-1] < sizes[0] == 15, "rows that end early are dropped"
    assert len({len(ids) for ids, _ in seen}) > 20
    with torch.no_grad():
        for ids, logits in seen:
            wanted = net(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert (logits.log_softmax(-1) - wanted)[wanted > -50].abs().max() < 1e-5


def test_a_lower_limit_gives_the_same_text_cut() -> None:
    net = model()
    long = write(net, PROMPTS)
    for limit in (1, 2, 7):
        short = write(net, PROMPTS, max_new_tokens=limit)
        assert all(a.startswith(b) for a, b in zip(long, short, strict=True))
        assert any(a != b for a, b in zip(long, short, strict=True))


def test_the_draws_are_those_of_the_models_distribution() -> None:
    net, draws = model(), 4000
    tails = write(net, ["Code"] * draws, max_new_tokens=1, keep_prompt=False, batch_size=draws)
    ids = torch.tensor([[0, *encode_text(TOKENIZER, "Code")]])
    found, probs = Counter(tails), net(ids).logits[0, -1].detach().softmax(-1)
    for i in probs.topk(12).indices.tolist():
        p, share = float(probs[i]), found[TABLE[i].decode()] / draws
        assert abs(share - p) < 5 * (p / draws) ** 0.5


def test_temperature_zero_and_a_narrow_nucleus_take_the_likeliest() -> None:
    net = model()
    ids = [0, *encode_text(TOKENIZER, PROMPTS[2])]
    for _ in range(10):
        ids.append(int(net(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 0:
            break
    wanted = b"".join(TABLE[i] for i in ids).decode()
    for sampling in ({"temperature": 0.0}, {"top_p": 1e-9}, {"temperature": 1e-6}):
        assert write(net, [PROMPTS[2]], max_new_tokens=10, **sampling) == [wanted]


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.9])
def test_a_nucleus_is_the_fewest_likeliest_ids_that_hold_its_mass(top_p: float) -> None:
    net = model()
    draws = ["Code"] * 2000
    tails = write(net, draws, max_new_tokens=1, keep_prompt=False, top_p=top_p, batch_size=2000)
    probs = (
        net(torch.tensor([[0, *encode_text(TOKENIZER, "Code")]])).logits[0, -1].detach().softmax(-1)
    )
    order = probs.argsort(descending=True).tolist()
    size = next(n for n in range(1, 300) if float(probs[order[:n]].sum()) >= top_p)
    nucleus = {TABLE[i].decode() for i in order[:size]}
    assert set(tails) <= nucleus
    likely = {TABLE[i].decode() for i in order[:size] if float(probs[i]) > 0.01}
    assert likely <= set(tails)


def test_a_row_ends_at_eos_or_where_the_context_is_full() -> None:
    net = model()
    with torch.no_grad():
        net.get_output_embeddings().bias[0] = 1e4
    assert write(net, PROMPTS) == PROMPTS
    with torch.no_grad():
        net.get_output_embeddings().bias[0] = -1e4
    read: list[int] = []
    hook = net.register_forward_pre_hook(
        lambda _m, _a, kwargs: read.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    (full,) = write(net, ["Code"], max_new_tokens=1000)
    hook.remove()
    assert max(read) == CONTEXT - 1, "the last place of the context is read, and none behind it"
    tokens = len(encode_text(TOKENIZER, "Code")) + len(read)
    assert tokens == CONTEXT
    assert full.startswith("Code")


def test_only_whole_characters_come_out_and_no_id_that_writes_nothing() -> None:
    net = model(ascii_only=False)
    bias = net.get_output_embeddings().bias
    with torch.no_grad():
        bias[0] = -1e4
        bias[TABLE.index("\u00e9".encode()[:1])] = 1e4
    assert write(net, ["Code"], max_new_tokens=3) == ["Code"], "half a character is left out"
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(TOKENIZER) + 500
    )
    padded = build_model(spec, 0)
    tails = complete(
        padded,
        TOKENIZER,
        ["Code"] * 200,
        max_new_tokens=1,
        temperature=3.0,
        seed=0,
        batch_size=200,
        keep_prompt=False,
    )
    ascii_share = sum(1 for piece in TABLE if piece.isascii()) / len(TABLE)
    assert sum(map(bool, tails)) / 200 > ascii_share - 0.2
    for text in write(model(ascii_only=False), PROMPTS * 20):
        text.encode()


def test_progress_rises_to_its_end_and_the_models_mode_stays() -> None:
    net, told = model().train(), list[tuple[int, int]]()
    write(net, PROMPTS, batch_size=2, on_progress=lambda done, total: told.append((done, total)))
    assert net.training
    done = [d for d, _ in told]
    assert done == sorted(done)
    assert done[-1] == told[-1][1] == 20 * len(PROMPTS)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(GenerateError, match=says):
        write(model(), ["a"], **changed)


def test_a_prompt_that_fills_the_context_and_a_diverged_model_are_refused() -> None:
    net = model()
    with pytest.raises(GenerateError, match=r"prompt 1 .* at most 47"):
        write(net, ["a", "x" * CONTEXT])
    write(net, ["x" * (CONTEXT - 1)])
    with torch.no_grad():
        net.get_output_embeddings().bias[5] = float("nan")
    with pytest.raises(GenerateError, match="not finite"):
        write(net, ["a"])


DOCUMENTS = [f"Code I{n}.{n % 7} is caf\u00e9 \u2603 of the breast." for n in range(30)]


def test_on_policy_prompts_open_like_public_documents_and_differ() -> None:
    texts = on_policy_prompts(
        model(), TOKENIZER, DOCUMENTS, share_of_document=(0.2, 0.8), count=50, seed=3
    )
    assert len(set(texts)) == len(texts) == 50
    again = on_policy_prompts(
        model(), TOKENIZER, DOCUMENTS, share_of_document=(0.2, 0.8), count=50, seed=3, batch_size=7
    )
    assert again == texts
    other = on_policy_prompts(
        model(), TOKENIZER, DOCUMENTS, share_of_document=(0.2, 0.8), count=50, seed=4
    )
    assert other != texts
    assert all(any(text[:4] == doc[:4] for doc in DOCUMENTS) for text in texts)
    assert not set(texts) & set(DOCUMENTS)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_an_opening_is_its_share_of_the_documents_tokens_in_whole_characters(share: float) -> None:
    document = "\u2603\u2603\u2603\u2603 caf\u00e9 is a Code."
    ids = encode_text(TOKENIZER, document)
    size = min(round(share * len(ids)), CONTEXT // 2)
    data = b"".join(TABLE[i] for i in ids[:size])
    opening = data.decode(errors="ignore")
    (text,) = on_policy_prompts(
        model(), TOKENIZER, [document], share_of_document=share, count=1, seed=0
    )
    assert text.startswith(opening)
    assert text != opening


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_space_that_a_tokenizer_puts_before_every_text_is_no_text(share: float) -> None:
    tokenizer = families.llama()
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
    )
    net = build_model(spec, 0)
    document = families.TEXTS[0]
    ids = encode_text(tokenizer, document)
    table = byte_table(tokenizer, len(tokenizer))
    assert table.prefix == b" "
    opening = b"".join(table.pieces[i] for i in ids[: round(share * len(ids))])[1:].decode()
    (text,) = on_policy_prompts(
        net, tokenizer, [document], share_of_document=share, count=1, seed=0, temperature=0.5
    )
    assert text.startswith(opening)
    marked = next(i for i, piece in enumerate(table.pieces) if piece == b" Code")
    head = torch.nn.Linear(32, len(tokenizer))
    with torch.no_grad():
        head.bias[marked] = 1e4
    net.set_output_embeddings(head)
    texts = complete(
        net, tokenizer, ["", "A"], max_new_tokens=2, temperature=0.0, seed=0, batch_size=2
    )
    assert texts == ["Code Code", "A Code Code"]


def test_on_policy_prompts_that_cannot_be_had_are_refused() -> None:
    net = model()
    with torch.no_grad():
        net.get_output_embeddings().bias[0] = 1e4
    with pytest.raises(GenerateError, match=r"found 0 different texts .* wanted 3"):
        on_policy_prompts(net, TOKENIZER, DOCUMENTS, share_of_document=0.5, count=3, seed=0)
    bad: list[tuple[Any, list[str], int]] = [
        (1.5, DOCUMENTS, 1),
        ((0.5, 0.2), DOCUMENTS, 1),
        (0.5, DOCUMENTS, 0),
        (0.5, [""], 1),
    ]
    for share, documents, count in bad:
        with pytest.raises(GenerateError, match="wanted 0 <= low"):
            on_policy_prompts(
                net, TOKENIZER, documents, share_of_document=share, count=count, seed=0
            )
