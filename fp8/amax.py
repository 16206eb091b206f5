"""The largest values of the last steps, which delayed scaling scales by."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from fp8.epoch import weight_epoch

INPUT: Final = 0
GRAD_OUTPUT: Final = 1


class AmaxHistory:
    """Largest values of a layer's input and gradient, one entry per optimizer step.

    Within a step they are gathered apart: micro-batches and recomputed activations then all use
    one scale. Source: Transformer Engine's DelayedScaling, amax_compute_algo "max".
    """

    def __init__(self, steps: int) -> None:
        self._past = torch.zeros(2, steps)
        self._now = torch.zeros(2)
        self._epoch = weight_epoch()

    def scale_by(self, role: int, x: Tensor, *, record: bool) -> Tensor:
        """Return the value to scale x by: the past's largest, or x's own while there is no past.

        Args: role: INPUT or GRAD_OUTPUT; record: whether x belongs to a training step.
        Returns: a float32 scalar; NaN when x is not finite, so that the cast cannot hide it.
        """
        self._past, self._now = self._past.to(x.device), self._now.to(x.device)
        current = x.detach().abs().amax().float() if x.numel() else self._now.new_zeros(())
        pages = self._pages()
        if record:
            if self._epoch != weight_epoch():
                self._past, self._now = pages, torch.zeros_like(self._now)
                self._epoch = weight_epoch()
            finite = current.nan_to_num(nan=0.0, posinf=0.0)
            self._now[role] = torch.maximum(self._now[role], finite)
        past = pages[role].amax()
        return torch.where(past > 0, past, current) + current * 0.0

    def state(self) -> dict[str, Tensor]:
        """Return all there is to resume from, as tensors."""
        due = torch.tensor(self._epoch != weight_epoch())
        return {"amax_past": self._past, "amax_now": self._now.clone(), "amax_due": due}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave.

        Raises: ValueError when it is of a history of another length.
        """
        steps, wanted = state["amax_past"].shape[-1], self._past.shape[-1]
        if steps != wanted:
            raise ValueError(
                f"the saved amax history has {steps} steps, this layer's {wanted}; "
                f"resume with DelayedScaling(history={steps})"
            )
        self._past, self._now = state["amax_past"].clone(), state["amax_now"].clone()
        self._epoch = -1 if bool(state["amax_due"]) else weight_epoch()

    def _pages(self) -> Tensor:
        """The past as it is now: with what was gathered since, if an optimizer has stepped.

        What is not recorded (evaluation, the first pass of a checkpointed block) reads it too,
        without turning the page.
        """
        if self._epoch == weight_epoch():
            return self._past
        return torch.cat([self._now.unsqueeze(1), self._past[:, :-1]], 1)
