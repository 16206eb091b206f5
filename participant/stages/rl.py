"""Reinforcement learning with rewards that can be checked: GRPO with DAPO's clip range, in FP8.

A rollout draws a group of answers to each of some prompts from the model as it is; a step follows
what was better than its group. Prompts and noise hang on seed and step alone, so a resumed stage
goes on as if it had not been broken. What says nothing is left out and counted: answers cut by
their limit, rewards that fail, groups all alike, in whose place other prompts are drawn.
"""

import copy
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fp8.train import Progress, TrainResult, train
from fusion.models import context_length
from participant.config import RlStage
from participant.stages.conversations import (
    Chat,
    ChatError,
    Skipped,
    UnusableError,
    question_of,
    read_lines,
)
from participant.stages.experience import Experience
from participant.stages.grpo import Clip, advantages, distance, token_losses
from participant.stages.rewards import REWARDS, reward
from participant.stages.rollout import Answer, Draw, answer_all, laid_out, logprobs_of
from participant.stages.sft import is_held_out, schedule_of, tell_ends
from participant.stages.steady import steady_attention

_LOG = logging.getLogger(__name__)
_MEASURED = 256
"""Held-out tasks that are answered at most."""


@dataclass(frozen=True, slots=True)
class Task:
    """A question with an answer that can be checked."""

    prompt: list[int]
    right: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """What a file of tasks holds for one model."""

    trained: list[Task]
    held_out: list[Task]
    skipped: Skipped


def read_tasks(model: PreTrainedModel, chat: Chat, stage: RlStage) -> Tasks:
    """Read lines of {"messages": [...], "answer": "..."}; what is skipped is counted by reason.

    Raises: ChatError when nothing is left to train on, or a reward is not known.
    """
    if unknown := sorted(stage.rewards.keys() - REWARDS.keys()):
        raise ChatError(f"found the rewards {unknown}, wanted some of {sorted(REWARDS)}")
    skipped, trained, held_out = Skipped(), list[Task](), list[Task]()
    room = context_length(model) + 1 - stage.max_new_tokens  # the last new token is not read
    for number, value in read_lines(stage.data):
        try:
            messages, right = question_of(value)
            prompt = chat.prompt(messages)
            if len(prompt) > room:
                raise UnusableError("too long")
        except UnusableError as error:
            skipped.add(error.reason, number)
            continue
        kept_back = is_held_out(json.dumps(messages, sort_keys=True), stage.held_out)
        (held_out if kept_back else trained).append(Task(prompt, right))
    if not trained:
        raise ChatError(
            f"{stage.data}: found no task to train on, wanted at least one (skipped: "
            f"{str(skipped) or 'none'}); add tasks, or lower held_out or max_new_tokens"
        )
    return Tasks(trained=trained, held_out=held_out, skipped=skipped)


def reinforce(
    model: PreTrainedModel,
    chat: Chat,
    stage: RlStage,
    *,
    checkpoint_dir: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train the model in place on the stage's tasks, from the checkpoint if there is one.

    The model answers in the precision it comes in, which is also the trainer's. Progress tells, in
    metrics: reward (mean of all answers drawn), the shares cut, failed (of answers) and alike (of
    groups), clipped (of tokens), weight, and gap: the largest difference in nats between a token's
    log-probability at the rollout and in the trainer.

    Raises: ChatError; CheckpointError and TrainingDivergedError as `fp8.train.train`.
    """
    tasks = read_tasks(model, chat, stage)
    if tasks.skipped.counts:
        _LOG.warning("%s: skipped %s", stage.data.name, tasks.skipped)
    tell_ends(model, chat)
    with steady_attention(model):
        rollouts = _Rollouts(model, chat, stage, tasks.trained, checkpoint_dir)
        return train(
            model,
            rollouts.batch_at,
            partial(policy_loss, stage=stage),
            schedule_of(stage, accumulate=stage.accumulate),
            checkpoint_dir=checkpoint_dir,
            on_progress=on_progress,
            should_stop=should_stop,
        )


def measure(model: PreTrainedModel, chat: Chat, stage: RlStage) -> dict[str, float]:
    """The stage's figures: reward, the mean of the likeliest answers to held-out tasks; skipped."""
    found = read_tasks(model, chat, stage)
    figures = {"skipped": float(found.skipped.counts.total())}
    if tasks := found.held_out[:_MEASURED]:
        draw = _draw(chat, stage, temperature=0.0)
        answers = answer_all(model, [task.prompt for task in tasks], draw, [stage.seed])
        scores = [_score(chat, stage, a, t) or 0.0 for a, t in zip(answers, tasks, strict=True)]
        figures["reward"] = float(np.mean(scores))
    return figures


def policy_loss(
    model: nn.Module, batch: Experience, *, stage: RlStage
) -> tuple[Tensor, Mapping[str, float]]:
    """Mean loss of the batch's tokens, and what it tells of the rollout."""
    if not batch.rows:  # all groups were alike: nothing to follow, so nothing moves
        return torch.zeros((), requires_grad=True), batch.figures
    clip = Clip(low=stage.clip_low, high=stage.clip_high, weight=stage.max_weight, kl=stage.kl)
    logp_N = logprobs_of(model, batch.ids, batch.said, stage.temperature)
    own = {name: value.to(logp_N.device) for name, value in batch.by_token.items()}
    old_N = own.get("old", logp_N.detach())
    loss_N, told = token_losses(logp_N, old_N, own["rollout"], own["advantage"], clip)
    told["gap"] = (old_N - own["rollout"]).abs().max()
    if "reference" in own:
        told["kl"] = distance(logp_N, own["reference"])
        loss_N = loss_N + clip.kl * told["kl"]
    figures = {name: float(value.detach().mean()) for name, value in told.items()}
    return loss_N.mean(), {**batch.figures, **figures}


class _Rollouts:
    """The batch of a step: part of the rollout that the model made when it was this step's turn."""

    def __init__(
        self,
        model: PreTrainedModel,
        chat: Chat,
        stage: RlStage,
        tasks: list[Task],
        folder: Path | None,
    ) -> None:
        self._model, self._chat, self._stage, self._tasks = model, chat, stage, tasks
        self._folder = folder
        self._newest: tuple[int, Experience] | None = None
        # Before `train` takes up a checkpoint: this is the model the stage began with.
        self._reference = copy.deepcopy(model).eval() if stage.kl else None

    def batch_at(self, step: int) -> Experience:
        index, part = divmod(step, self._stage.updates)
        if self._newest is None or self._newest[0] != index:
            self._newest = (index, self._taken_up(index, part) or self._made(index))
        return self._newest[1].part(part, self._stage.updates)

    def _taken_up(self, index: int, part: int) -> Experience | None:
        """What was drawn before the model moved on: it cannot be drawn again."""
        if not part or self._folder is None:
            return None
        return Experience.read(self._folder / f"rollout-{index}.safetensors")

    def _made(self, index: int) -> Experience:
        stage, kept, figures = self._stage, list[tuple[Answer, float]](), Counter[str]()
        order = np.random.default_rng([stage.seed, index]).permutation(len(self._tasks))
        for draw in range(stage.redraws + 1):
            picked = order[draw * stage.prompts : (draw + 1) * stage.prompts]
            groups = self._groups([self._tasks[i] for i in picked], [stage.seed, index, draw])
            for group in groups:
                kept += _followed(group, figures, cut_is_wrong=stage.cut == "wrong")
            if figures["groups"] - figures["alike"] >= stage.prompts or not groups:
                break
        return self._weighed(index, kept, _shares(figures))

    def _groups(
        self, tasks: list[Task], seed: list[int]
    ) -> list[list[tuple[Answer, float | None]]]:
        stage, size = self._stage, self._stage.samples
        prompts = [task.prompt for task in tasks for _ in range(size)]
        drawn = answer_all(
            self._model, prompts, _draw(self._chat, stage, temperature=stage.temperature), seed
        )
        scored = [(a, _score(self._chat, stage, a, tasks[i // size])) for i, a in enumerate(drawn)]
        return [scored[i : i + size] for i in range(0, len(scored), size)]

    def _weighed(
        self, index: int, kept: list[tuple[Answer, float]], figures: dict[str, float]
    ) -> Experience:
        if not kept:
            _LOG.warning("rollout %d: no group of answers says what is better; skipped", index)
            return Experience.empty(figures)
        answers, updates = [answer for answer, _ in kept], self._stage.updates
        ids_BT, said_BT = laid_out(answers)
        repeats = torch.tensor([len(answer.ids) for answer in answers])
        by_token = {
            "rollout": torch.tensor([p for answer in answers for p in answer.logprobs]),
            "advantage": torch.tensor([a for _, a in kept]).repeat_interleave(repeats),
        }
        made = Experience(ids_BT, said_BT, by_token, figures)
        if self._reference is not None:
            made = made.told("reference", partial(self._logprobs, self._reference), updates)
        if updates > 1:
            made = made.told("old", partial(self._logprobs, self._model), updates)
            if self._folder is not None:
                # A checkpoint may be that many rollouts old.
                keep = self._stage.checkpoint_every // updates + 2
                made.write(self._folder, index, keep=keep)
        return made

    @torch.no_grad()
    def _logprobs(self, model: nn.Module, ids_BT: Tensor, said_BT: Tensor) -> Tensor:
        return logprobs_of(model, ids_BT, said_BT, self._stage.temperature).cpu()


def _draw(chat: Chat, stage: RlStage, *, temperature: float) -> Draw:
    ends = frozenset(chat.end_ids)
    return Draw(max_new_tokens=stage.max_new_tokens, temperature=temperature, ends=ends)


def _score(chat: Chat, stage: RlStage, answer: Answer, task: Task) -> float | None:
    """The reward of an answer that came to its end, None when it fails; 0 of one that was cut."""
    return 0.0 if answer.cut else reward(stage.rewards, chat.decode(answer.ids), task.right)


def _followed(
    group: list[tuple[Answer, float | None]], figures: Counter[str], *, cut_is_wrong: bool
) -> list[tuple[Answer, float]]:
    """The answers to follow and how far; what was left out is added to the figures."""
    scores = [None if a.cut and not cut_is_wrong else score for a, score in group]
    known = [score for _, score in group if score is not None]
    figures.update(groups=1, answers=len(group), cut=sum(a.cut for a, _ in group))
    figures.update(known=len(known), failed=len(group) - len(known))
    figures["reward"] += sum(known)  # type: ignore[assignment]
    found = advantages(scores)
    if found is None:
        figures["alike"] += 1
        return []
    pairs = zip(group, found, strict=True)
    return [(answer, advantage) for (answer, _), advantage in pairs if advantage is not None]


def _shares(figures: Counter[str]) -> dict[str, float]:
    """Counts over what they were counted among."""
    of: dict[str, Any] = {"reward": "known", "cut": "answers", "failed": "answers"}
    of["alike"] = "groups"
    return {name: figures[name] / max(1, figures[whole]) for name, whole in of.items()}
