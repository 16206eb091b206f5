from functools import cache

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.tokenizer_files import SPACE
from fusion.byte_tables import ByteTable, TokenizerError, byte_table, encode, encode_text
from fusion.models import encode_documents, eos_id
from tests.fusion.families import BYTES, FAMILIES, TEXTS, byte_level, fast, llama

PADDING = 7


@cache
def family(name: str) -> tuple[PreTrainedTokenizerFast, ByteTable]:
    tokenizer = FAMILIES[name]()
    return tokenizer, byte_table(tokenizer, len(tokenizer) + PADDING)


def spelled(table: ByteTable, ids: list[int]) -> bytes:
    return b"".join(table.pieces[i] for i in ids)


@given(st.sampled_from(list(FAMILIES)), st.text())
@example("SentencePiece BPE, metaspace always", "  two spaces first")
@example("SentencePiece Unigram", " \u00e9\U0001f600\x00")
@example("byte-level BPE with a prefix space", " one space first")
@example("byte-level BPE (GPT-2, Qwen)", "what a special is renamed to: \uffff0")
@example("byte-level BPE with added tokens (DeepSeek)", "a     <th\u00efnk>")
def test_a_text_is_spelled_to_the_last_byte_after_the_prefix(name: str, text: str) -> None:
    tokenizer, table = family(name)
    if SPACE in text and "SentencePiece" in name:
        with pytest.raises(TokenizerError, match="from byte"):
            encode(tokenizer, table, text)
        return
    for prefixed, prefix in ((True, table.prefix), (False, b"")):
        ids = encode(tokenizer, table, text, prefixed=prefixed)
        assert spelled(table, ids) == (prefix + text.encode() if text else b"")
        assert all(table.pieces[i] for i in ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_specials_in_a_text_are_text(name: str) -> None:
    tokenizer, table = family(name)
    written = [*tokenizer.all_special_tokens, "<s>", "</s>", "<|endoftext|>", "<unk>"]
    for token in written:
        for text in (token, f"a{token}b", f"a {token} b"):
            ids = encode(tokenizer, table, text)
            assert not set(ids) & set(tokenizer.all_special_ids)
            assert spelled(table, ids) == table.prefix + text.encode()


def test_a_byte_token_in_a_text_is_text_or_the_text_is_refused() -> None:
    for name in FAMILIES:
        tokenizer, table = family(name)
        if "Unigram" in name:  # its search takes the longest name there is
            with pytest.raises(TokenizerError, match="from byte 1 on it spells b'A'"):
                encode(tokenizer, table, "<0x41>")
        else:
            ids = encode(tokenizer, table, "<0x41>")
            assert spelled(table, ids) == table.prefix + b"<0x41>"


@pytest.mark.parametrize("name", FAMILIES)
def test_ordinary_text_gets_the_tokenizers_own_ids(name: str) -> None:
    tokenizer, table = family(name)
    for text in ["Code I63.9 is cerebral infarction", "Neoplasm\n of  caf\u00e9\u4f60\t", "a\n\nb"]:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encode(tokenizer, table, text) == own
        assert encode_text(tokenizer, text) == own


@pytest.mark.parametrize("name", FAMILIES)
def test_specials_and_padding_write_nothing_and_every_byte_can_be_written(name: str) -> None:
    tokenizer, table = family(name)
    assert len(table.pieces) == len(tokenizer) + PADDING
    assert not any(table.pieces[-PADDING:])
    assert not any(table.pieces[i] for i in tokenizer.all_special_ids)
    assert {bytes([byte]) for byte in range(256)} <= set(table.pieces)
    assert len(byte_table(tokenizer, 100).pieces) == 100


def test_a_prefix_is_read_from_the_tokenizers_rules() -> None:
    prefixes = {name: family(name)[1].prefix for name in FAMILIES}
    without = {name for name, prefix in prefixes.items() if not prefix}
    assert without == {
        "byte-level BPE (GPT-2, Qwen)",
        "byte-level BPE with added tokens (DeepSeek)",
        "rank table (tiktoken, Tekken)",
        "SentencePiece BPE, no prefix (Gemma)",
    }
    assert set(prefixes.values()) == {b"", b" "}


def test_bytes_and_pieces_of_sentencepiece_are_told_apart() -> None:
    tokenizer, table = family("SentencePiece BPE, normalizer (Llama 2)")
    vocab = tokenizer.get_vocab()
    assert table.pieces[vocab["<0xE9>"]] == b"\xe9"
    assert table.pieces[vocab[SPACE]] == b" "
    # A twin: the byte of "e" and the piece "e" write the same; the text has the piece.
    assert table.pieces[vocab["<0x65>"]] == table.pieces[vocab["e"]] == b"e"
    assert encode(tokenizer, table, "e", prefixed=False) == [vocab["e"]]
    assert {table.pieces[vocab[name]] for name in BYTES} == {bytes([b]) for b in range(256)}


def _collapsing() -> PreTrainedTokenizerFast:
    tokenizer = llama()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("  ", " "), normalizers.Replace(" ", SPACE)]
    )
    return tokenizer


def _compatibility() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def _without_bytes() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["</s>"])
    return fast(tokenizer)


@pytest.mark.parametrize(
    ("make", "kept", "lost", "byte"),
    [
        (_collapsing, "a b", "a  b", 2),
        (_compatibility, "a b", "ab \ufb01", 3),
        (_without_bytes, "ab", "abx", 2),
    ],
)
def test_a_lost_byte_is_named_and_a_kept_text_passes(make, kept, lost, byte) -> None:
    tokenizer = make()
    table = byte_table(tokenizer, len(tokenizer))
    assert spelled(table, encode(tokenizer, table, kept)) == kept.encode()
    with pytest.raises(TokenizerError, match=f"from byte {byte} on"):
        encode(tokenizer, table, lost)
    with pytest.raises(TokenizerError):
        encode_text(tokenizer, lost)


def test_a_long_text_is_read_whole_whatever_the_tokenizer_would_cut_or_pad() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    ids = encode_text(tokenizer, TEXTS[0])
    assert 5 < len(ids) < 500


def test_a_text_is_refused_when_the_model_has_no_ids_for_it() -> None:
    tokenizer = byte_level()
    ids = encode_text(tokenizer, TEXTS[0])
    with pytest.raises(TokenizerError, match="does not give back"):
        encode(tokenizer, byte_table(tokenizer, max(ids)), TEXTS[0])


def test_a_decoder_that_hides_what_tokens_write_is_refused() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match=r"WordPiece.*byte-level"):
        byte_table(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 3)


def test_a_special_token_that_is_only_named_takes_nothing_away() -> None:
    tokenizer = byte_level()
    tokenizer._special_tokens_map["sep_token"] = "<not there>"
    assert None in tokenizer.all_special_ids
    assert encode_text(tokenizer, TEXTS[0]) == encode_text(byte_level(), TEXTS[0])


def test_a_tokenizer_that_grows_is_read_anew() -> None:
    tokenizer = byte_level()
    before = encode_text(tokenizer, "<new>")
    tokenizer.add_tokens(["<new>"])
    assert encode_text(tokenizer, "<new>") == [len(tokenizer) - 1] != before


@pytest.mark.parametrize("name", FAMILIES)
def test_documents_have_no_bos_whatever_the_tokenizer_adds(name: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = FAMILIES[name]()
    eos = eos_id(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.eos_token} $A", special_tokens=[(tokenizer.eos_token, eos)]
    )
    assert tokenizer("Code")["input_ids"][0] == eos
    code = encode_text(tokenizer, "Code")
    stream = encode_documents(tokenizer, ["Code", "", "Code"])
    assert np.array_equal(stream, [*code, eos, eos, *code, eos])
    assert eos not in code
