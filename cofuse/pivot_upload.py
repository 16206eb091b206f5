"""A pivot's way to the Hugging Face Hub: only whole, only by somebody's explicit word."""

import hashlib
import re
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class UploadError(ValueError):
    """A pivot is not to be uploaded; the message says what helps."""


def upload_pivot(folder: Path, repository: str, *, token: str | None, public: bool) -> str:
    """Upload a folder's files, those of SHA256SUMS and no others; return the address.

    Args: token: of the Hub; None: the one that `hf auth login` keeps.
    Raises: UploadError before anything is sent, or with what the Hub said.
    """
    if constants.is_offline_mode():
        raise UploadError("HF_HUB_OFFLINE is set: nothing leaves this machine; unset it to upload")
    if (token := token or get_token()) is None:
        raise UploadError("no token of the Hub: set HF_TOKEN, or run `hf auth login`")
    if not _REPOSITORY.fullmatch(repository):
        raise UploadError(f"found {repository!r}, wanted OWNER/NAME")
    names = _whole(folder)
    api = HfApi(token=token)
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=names,
            commit_message=f"Add {folder.resolve().name}",
        )
    except (HfHubHTTPError, OSError) as error:
        raise UploadError(
            f"the Hub did not take it: {' '.join(str(error).split())[:300]}"
        ) from None
    return str(address)


def _whole(folder: Path) -> list[str]:
    """The names of SHA256SUMS and itself, each checked. Raises: UploadError."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name, wanted in sums.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise UploadError(f"{path} is missing, or a link: pull the pivot again")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                raise UploadError(f"{path} is not the file of SHA256SUMS: pull the pivot again")
    return [*sums, "SHA256SUMS"]
