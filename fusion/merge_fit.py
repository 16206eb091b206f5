"""Whether model directories are of one model: names, shapes and vocabularies, before any merge."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fusion.merge_settings import MergeError
from fusion.model_folder import HEADS, ModelFolder


def twins_of(base: ModelFolder) -> dict[str, str]:
    """Find heads that are stored although the config ties them to an embedding."""
    found = {}
    for head in base.tensors:
        if not (base.ties_head and head.endswith(HEADS)):
            continue
        for name, stored in base.tensors.items():
            is_like = name != head and stored.shape == base.tensors[head].shape
            if is_like and torch.equal(base.read(name), base.read(head)):
                found[head] = name
                break
    return found


def check_vocabulary(base: ModelFolder, source: str, folder: ModelFolder) -> None:
    """Compare the tokenizers, where both have one. Raises: MergeError that names them."""
    ours, theirs = base.vocabulary(), folder.vocabulary()
    if ours is None or theirs is None or ours == theirs:
        return
    token, _ = min(set(ours.items()) ^ set(theirs.items()), key=lambda pair: (pair[1], pair[0]))
    raise MergeError(
        f"the tokenizers differ: {base.path / 'tokenizer.json'} has {len(ours)} tokens, "
        f"{folder.path / 'tokenizer.json'} of {source} has {len(theirs)}, and {token!r} is id "
        f"{ours.get(token)} in the one, {theirs.get(token)} in the other; rows of their embeddings "
        "mean different tokens: fuse by logits instead"
    )


def check_tensors(
    base: ModelFolder, source: str, folder: ModelFolder, twins: Mapping[str, str]
) -> list[str]:
    """Compare names and shapes. Returns: notes. Raises: MergeError with all that differs."""
    missing = [n for n in base.tensors if n not in folder.tensors and n not in twins]
    extra = [n for n in folder.tensors if n not in base.tensors]
    is_config_free = not folder.config
    spare = [
        n
        for n in extra
        if is_config_free or (folder.ties_head and base.ties_head)
        if n.endswith(HEADS)
    ]
    extra = [n for n in extra if n not in spare]
    if is_config_free:  # Fisher information is of what was trained, not of buffers
        missing = [n for n in missing if base.tensors[n].floats]
    shapes = {
        n: (folder.tensors[n].shape, stored.shape)
        for n, stored in base.tensors.items()
        if n in folder.tensors and folder.tensors[n].shape != stored.shape
    }
    for name, (theirs, ours) in shapes.items():
        if len(ours) == 2 and theirs[1:] == ours[1:] and _is_vocabulary(name, ours, theirs, base):
            raise MergeError(
                f"{name} has {theirs[0]} rows in {source} and {ours[0]} in the base: their "
                f"vocabularies are padded or extended differently (tokenizers in {folder.path} "
                f"and {base.path}); resize both to one size first, or fuse by logits"
            )
    if missing or extra or shapes:
        lists = {"missing": missing, "extra": extra, "of another shape": list(shapes)}
        told = "; ".join(f"{len(v)} {k}: {', '.join(v[:5])}" for k, v in lists.items() if v)
        first = next(iter(shapes.items()), None)
        raise MergeError(
            f"{source} is not of the base's architecture: tensors {told}"
            f"{'' if first is None else f' ({first[0]}: {first[1][0]}, wanted {first[1][1]})'}; "
            "merge models trained from this base"
        )
    return [f"{name} of {source} is left out: both configs tie it" for name in spare]


def _is_vocabulary(
    name: str, ours: tuple[int, ...], theirs: tuple[int, ...], base: ModelFolder
) -> bool:
    text = base.config.get("text_config", base.config)
    return ours[0] == text.get("vocab_size") or name.endswith(HEADS)
