"""What a rollout leaves to learn from: answers, and numbers for each of their tokens.

Shapes: B = answers, T = tokens of the longest with its prompt, N = tokens of all answers.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from protos.files import flush


@dataclass(frozen=True, slots=True)
class Experience:
    """A rollout, or some of its rows: a batch of `fp8.train`."""

    ids: Tensor
    """[B, T] prompts, answers, padding."""
    said: Tensor
    """[B, T] bool: which of them the answers are."""
    by_token: Mapping[str, Tensor]
    """[N] each, row by row: rollout, advantage; old and reference where they are wanted."""
    figures: Mapping[str, float]
    """What is told of the whole rollout."""

    @classmethod
    def empty(cls, figures: Mapping[str, float]) -> "Experience":
        """Nothing to learn from."""
        return cls(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1).bool(), {}, figures)

    @property
    def rows(self) -> int:
        """How many answers there are."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """What the loss is a mean over; 1 where there is nothing, so that it can be weighed."""
        return max(1, int(self.said.sum()))

    def part(self, index: int, parts: int) -> "Experience":
        """One of `parts` pieces: consecutive answers, as even as they go; some may be empty."""
        counts = [int(rows.sum()) for rows in self.said.tensor_split(parts)]
        start, stop = sum(counts[:index]), sum(counts[: index + 1])
        return Experience(
            self.ids.tensor_split(parts)[index],
            self.said.tensor_split(parts)[index],
            {name: value[start:stop] for name, value in self.by_token.items()},
            self.figures,
        )

    def told(self, name: str, ask: Callable[[Tensor, Tensor], Tensor], parts: int) -> "Experience":
        """The same with one more number a token; ask(ids, said) -> [N], a piece at a time."""
        pieces = [self.part(i, parts) for i in range(parts)]
        found = torch.cat([ask(p.ids, p.said) for p in pieces if p.rows])
        return replace(self, by_token={**self.by_token, name: found})

    def write(self, folder: Path, index: int, *, keep: int) -> None:
        """Write it durably as rollout-<index>, and remove those `keep` and more before it."""
        folder.mkdir(parents=True, exist_ok=True)
        draft, target = folder / "rollout.draft", folder / f"rollout-{index}.safetensors"
        tensors = {"ids": self.ids, "said": self.said, **self.by_token}
        whole = {name: value.contiguous() for name, value in tensors.items()}
        save_file(whole, draft, metadata={"figures": json.dumps(dict(self.figures))})
        flush(draft)
        draft.rename(target)
        flush(folder)
        for old in folder.glob("rollout-*.safetensors"):
            if int(old.stem.removeprefix("rollout-")) <= index - keep:
                old.unlink()

    @classmethod
    def read(cls, path: Path) -> "Experience | None":
        """Read what `write` wrote; None when it is not there."""
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            figures = json.loads(file.metadata()["figures"])
        return cls(tensors.pop("ids"), tensors.pop("said"), tensors, figures)
