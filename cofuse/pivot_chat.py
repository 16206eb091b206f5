"""Talking with a pivot in a terminal. Loaded when a command needs it: torch takes seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TextStreamer

from cofuse.model_folder import FolderError, load_folder
from fusion.models import encode_text, eos_id

Turn = dict[str, str]
"""{"role": "user" | "assistant", "content": ...}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """How a pivot answers."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0: always the likeliest token."""
    seed: int = 0


class Talk:
    """One conversation. Without a chat template the pivot writes on from each line by itself."""

    def __init__(self, folder: Path, voice: Voice) -> None:
        """Raises: FolderError when the folder cannot be read."""
        if not (folder / "tokenizer.json").is_file():
            raise FolderError(
                f"{folder}: found no tokenizer.json, wanted a pivot with its tokenizer"
            )
        self._model = load_folder(folder)
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        self._voice = voice
        self.begin_anew()

    @property
    def chats(self) -> bool:
        """Whether it has a chat template, and so remembers what was said."""
        return bool(self._tokenizer.chat_template)

    def begin_anew(self) -> None:
        """Forget what was said, so that the next answer hangs on its own line alone."""
        self._said: list[Turn] = []
        torch.manual_seed(self._voice.seed)

    def answer(self, words: str, *, streamed: bool = False) -> str:
        """What it says to a line. Args: streamed: write it to stdout as it comes.

        Raises: FolderError when what was said leaves no room in its context.
        """
        said = [*self._said, {"role": "user", "content": words}]
        ids = prompt_ids(self._tokenizer, said)
        room = int(self._model.config.max_position_embeddings) - len(ids)
        if room < 1:
            raise FolderError(f"{len(ids)} tokens leave no room to answer: say less, or begin anew")
        text = self._write(ids, min(room, self._voice.max_new_tokens), streamed=streamed)
        if self.chats:
            self._said = [*said, {"role": "assistant", "content": text}]
        return text

    def _write(self, ids: Sequence[int], limit: int, *, streamed: bool) -> str:
        voice, model = self._voice, self._model
        drawn = {"do_sample": voice.temperature > 0}
        if voice.temperature > 0:
            drawn |= {"temperature": voice.temperature, "top_k": 0}  # type: ignore[dict-item]
        streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids_BT = torch.tensor([ids])
        out_BT = _generate(
            model,
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=limit,
            use_cache=True,
            pad_token_id=eos_id(self._tokenizer),
            streamer=streamer if streamed else None,
            **drawn,
        )
        return str(self._tokenizer.decode(out_BT[0, len(ids) :], skip_special_tokens=True))


def prompt_ids(tokenizer: PreTrainedTokenizerFast, said: Sequence[Turn]) -> list[int]:
    """What the model reads: the conversation by its template, else the last line as a document."""
    if not tokenizer.chat_template:
        return [eos_id(tokenizer), *encode_text(tokenizer, said[-1]["content"])]
    text = tokenizer.apply_chat_template(list(said), add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _generate(model: PreTrainedModel, ids_BT: torch.Tensor, **how: object) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.generate(ids_BT, **how)
    return found
