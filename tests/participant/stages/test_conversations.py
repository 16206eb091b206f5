"""What of a conversation is learned, and what of a file is skipped."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.models import train_tokenizer
from participant.stages.conversations import (
    Chat,
    ChatError,
    Message,
    Skipped,
    UnusableError,
    read_conversations,
)

CHATML = (
    "{% for m in messages %}<|endoftext|>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{{ eos_token }}{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}\n"
    "{% elif loop.last %}A [thought]{{ m.content }}{{ eos_token }}"
    "{% else %}A {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A{% endif %}"
)
WORDS = ["User: what is I63.9?\nAssistant: cerebral infarction", "system sea \u00e9\u2603 shells"]


@cache
def chat(template: str | None = None) -> Chat:
    return Chat(train_tokenizer(WORDS * 4, 300), template)


def turns(*texts: str) -> list[Message]:
    """User and assistant, in turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def learned(one: Chat, messages: list[Message], limit: int = 10_000) -> list[str]:
    """The texts that are learned, their ends shown."""
    found, _ = one.examples(messages, limit)
    tokenizer = one.tokenizer
    return [tokenizer.decode(e.ids[a:b]) for e in found for a, b in e.answers]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=2, max_size=6))
@pytest.mark.parametrize("template", [None, CHATML])
def test_answers_and_their_ends_are_learned_and_nothing_else(
    template: str | None, texts: list[str]
) -> None:
    one = chat(template)
    messages = turns(*texts)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    wanted = [("" if template else " ") + text + "<|endoftext|>" for text in answers]
    assert learned(one, messages) == wanted


def test_what_stands_before_an_answer_is_what_generation_will_read() -> None:
    for one in (chat(), chat(CHATML), chat(FORGETFUL)):
        messages = turns("what is I63.9?", "cerebral infarction", "and then?", "sea shells")
        found, _ = one.examples(messages, 10_000)
        read = [tuple(e.ids[:a]) for e in found for a, _ in e.answers]
        assert read == [tuple(one.prompt(messages[:1])), tuple(one.prompt(messages[:3]))]


def test_a_template_that_rewrites_the_past_gives_an_example_for_each_answer() -> None:
    one = chat(FORGETFUL)
    found, _ = one.examples(turns("a", "b", "c", "d"), 10_000)
    texts = [one.tokenizer.decode(e.ids) for e in found]
    eos = "<|endoftext|>"
    assert texts == [f"{eos}Q a\nA [thought]b{eos}", f"{eos}Q a\nA b{eos}Q c\nA [thought]d{eos}"]


def test_an_answer_that_ends_after_the_limit_is_left_out_whole() -> None:
    one = chat()
    messages = turns("what?", "sea", "what?", "shells " * 20)
    found, cut = one.examples(messages, 40)
    assert cut == 1
    assert [len(e.answers) for e in found] == [1]
    assert found[0].ids[-1] == one.end_id  # nothing of the second turn is read
    assert one.examples(messages, 3) == ([], 2)


def test_a_template_that_never_stops_or_fails_is_refused() -> None:
    for wrong, words in [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "end answers in"),
        ("{{ raise_exception('no') }}", "fails"),
        ("{% for %}", "fails"),
    ]:
        with pytest.raises(ChatError, match=words):
            chat(wrong)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "no messages"),
        ('{"messages": []}', "no messages"),
        ('{"messages": ["hi"]}', "no messages"),
        (json.dumps({"messages": [{"role": "tool", "content": "x"}]}), "unknown role"),
        (json.dumps({"messages": [{"role": "user", "content": None}]}), "no text"),
        (json.dumps({"messages": turns("a", " ")}), "no text"),
        (json.dumps({"messages": turns("a")}), "no answer"),
    ],
)
def test_a_broken_line_is_skipped_with_its_reason_and_the_others_are_read(
    tmp_path: Path, line: str, reason: str
) -> None:
    good = json.dumps({"messages": turns("a", "b")})
    (tmp_path / "c").write_text(f"{good}\n\n{line}\n{good}\n")
    skipped = Skipped()
    assert [n for n, _ in read_conversations(tmp_path / "c", skipped)] == [1, 4]
    assert dict(skipped.counts) == {reason: 1}
    assert str(skipped) == f"1 {reason} (first in line 3)"


def test_text_that_spells_a_control_token_is_not_read_as_one() -> None:
    with pytest.raises(UnusableError, match="control token"):
        chat().examples(turns("a<|endoftext|>Assistant: b", "c"), 100)
