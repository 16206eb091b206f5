import base64
import io
import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.alignment import LOADERS, package_file, quicktok_ranks, tokenizer_of
from benchmarks.tokenizer_files import (
    CL100K,
    O200K,
    QWEN,
    SPACE,
    from_ranks,
    load_sentencepiece,
    load_tekken,
    load_tiktoken,
)
from fusion.byte_tables import TokenizerError, byte_table, encode, encode_text
from tests.fusion.families import TEXTS, rank_table

HARD = [
    "Hello   world\n\n\n  don't DON'T 12345678 caf\u00e9 \u4f60\u597d \U0001f600 \t\tx",
    " a",
    "  a ",
    "\n",
    "e\u0301 \u2028 x\u00a0y",
    "<|endoftext|> </s> <unk> <s> [INST]",
    "  \t\n  aaaaaaaaaaaaaaaaaaaaaaaaaaaa      ",
    Path(__file__).read_text(encoding="utf-8"),
]


def ranks_of(tokenizer) -> dict[bytes, int]:
    pieces = byte_table(tokenizer, len(tokenizer)).pieces
    return {piece: index for index, piece in enumerate(pieces) if piece}


@cache
def small() -> tuple[object, object]:
    tiktoken = pytest.importorskip("tiktoken")
    tokenizer = rank_table()
    ranks = ranks_of(tokenizer)
    return tokenizer, tiktoken.Encoding(
        "small", pat_str=CL100K, mergeable_ranks=ranks, special_tokens={}
    )


@given(st.text() | st.text("aeiorst <>/.\n"))
def test_a_rank_table_cuts_every_text_as_tiktoken_does(text: str) -> None:
    tokenizer, maker = small()
    assert encode_text(tokenizer, text) == maker.encode(text, disallowed_special=())


def test_a_piece_that_no_merge_reaches_is_written_where_it_is_a_whole_word() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"xyz": 256}
    tokenizer = from_ranks(ranks, CL100K, {"</s>": 257}, eos="</s>")
    assert encode_text(tokenizer, "xyz") == [256]
    assert encode_text(tokenizer, "xyzw") == list(b"xyzw")


def test_special_tokens_have_the_ids_they_are_given() -> None:
    tokenizer = rank_table()
    vocab = tokenizer.get_vocab()
    assert vocab["<|endoftext|>"] == vocab["</s>"] + 5
    assert tokenizer.eos_token_id == vocab["</s>"]


def test_a_rank_table_without_all_bytes_or_with_a_special_that_is_text_is_refused() -> None:
    ranks = ranks_of(rank_table())
    with pytest.raises(TokenizerError, match="bytes \\[65\\]"):
        from_ranks({p: r for p, r in ranks.items() if p != b"A"}, CL100K, {}, eos="</s>")
    with pytest.raises(TokenizerError, match="rename the special"):
        from_ranks(ranks, CL100K, {"A": 9999}, eos="A")


def test_tiktoken_and_tekken_files_are_read_with_their_own_ids(tmp_path: Path) -> None:
    ranks = ranks_of(rank_table())
    lines = (base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items())
    (tmp_path / "small.tiktoken").write_bytes(b"".join(lines))
    tiktoken = load_tiktoken(tmp_path / "small.tiktoken", CL100K)
    assert tiktoken.eos_token_id == len(ranks)
    kept = len(ranks) - 3
    spec = {
        "config": {
            "pattern": CL100K,
            "default_vocab_size": kept + 10,
            "default_num_special_tokens": 10,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode()}
            for piece, rank in ranks.items()
        ],
        "special_tokens": [{"rank": 4, "token_str": "</s>"}],
    }
    (tmp_path / "tekken.json").write_text(json.dumps(spec))
    tekken = load_tekken(tmp_path / "tekken.json")
    assert tekken.eos_token_id == 4
    assert len(tekken) == kept + 10
    for text in TEXTS[:2]:
        own = encode_text(tiktoken, text)
        assert own == encode_text(rank_table(), text)
        if max(own) < kept:
            assert encode_text(tekken, text) == [index + 10 for index in own]
    del spec["special_tokens"]
    (tmp_path / "tekken.json").write_text(json.dumps(spec))
    assert load_tekken(tmp_path / "tekken.json").eos_token_id == 2


def trained(folder: Path, kind: str, **options: object) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=370,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=9,
        **{
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            # Unigram weighs a symbol like any piece, so a run of spaces may be read otherwise.
            "user_defined_symbols": ["[INST]", *([SPACE * 4] if kind == "bpe" else [])],
            **options,
        },
    )
    path = folder / f"{kind}.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_a_sentencepiece_model_is_read_as_sentencepiece_reads_it(
    kind: str, dummy_prefix: bool, tmp_path: Path
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = trained(tmp_path, kind, add_dummy_prefix=dummy_prefix)
    maker = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_sentencepiece(path)
    table = byte_table(tokenizer, len(tokenizer))
    assert table.prefix == (b" " if dummy_prefix else b"")
    assert tokenizer.eos_token_id == maker.eos_id()
    for text in [*TEXTS[:2], *HARD[:-1], "a    b [INST] c"]:
        assert encode(tokenizer, table, text) == maker.encode(text)


def test_a_sentencepiece_model_that_rewrites_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="nmt_nfkc"):
        load_sentencepiece(trained(tmp_path, "bpe", normalization_rule_name="nmt_nfkc"))
    with pytest.raises(TokenizerError, match="remove_extra_whitespaces=True"):
        load_sentencepiece(trained(tmp_path, "bpe", remove_extra_whitespaces=True))


# ---------------------------------------------------------------------------- real tokenizers
def real(name: str):
    try:
        return tokenizer_of(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "name", [n if "v1" in n else pytest.param(n, marks=pytest.mark.slow) for n in LOADERS]
)
def test_real_tokenizers_spell_every_text(name: str) -> None:
    tokenizer = real(name)
    table = byte_table(tokenizer, len(tokenizer) + 100)
    for text in HARD:
        assert b"".join(table.pieces[i] for i in encode(tokenizer, table, text)) == (
            table.prefix + text.encode()
        )
    for token in tokenizer.all_special_tokens:
        assert not set(encode(tokenizer, table, f"a{token} b")) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
def test_mistrals_sentencepiece_models_give_mistrals_ids(name: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    try:
        path = package_file("mistral-common", f"mistral_common/data/{name}")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    maker, tokenizer = (
        sentencepiece.SentencePieceProcessor(model_file=str(path)),
        load_sentencepiece(path),
    )
    for text in [*HARD, *TEXTS]:
        assert encode_text(tokenizer, text) == maker.encode(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pattern"), [("cl100k", CL100K), ("o200k", O200K), ("qwen", QWEN)]
)
def test_real_rank_tables_give_tiktokens_ids(name: str, pattern: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    tokenizer = real(name)
    ranks = ranks_of(tokenizer) if name == "qwen" else quicktok_ranks(name)
    maker = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in [*HARD, *TEXTS]:
        assert encode_text(tokenizer, text) == maker.encode(text, disallowed_special=())


@pytest.mark.slow
def test_tekken_gives_mistral_commons_ids() -> None:
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    tokenizer = real("tekken")
    path = package_file("mistral-common", "mistral_common/data/tekken_240911.json")
    maker = tekken.Tekkenizer.from_file(str(path))
    assert tokenizer.eos_token_id == maker.eos_id
    for text in [*HARD, *TEXTS]:
        assert encode_text(tokenizer, text) == maker.encode(text, bos=False, eos=False)
