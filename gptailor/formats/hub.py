"""An export on the Hugging Face hub: which files would go there, and sending them.

The repository is private until its owner says otherwise on the hub's page: layers of several people are in the model,
and all their licences apply. Whoever is signed in there (`hf auth login`, or HF_TOKEN) is the author.
"""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from gptailor.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def refuse_name(repo: str) -> None:
    """Raise UserError for what cannot be a repository's name."""
    if not _NAME.fullmatch(repo):
        raise UserError(f"push: {repo!r} is no name on the hub; expected OWNER/NAME, such as ada/llama-2-5b")


def uploads(folder: Path) -> list[tuple[str, int]]:
    """Path and bytes of every file that would be sent, in order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]


def push(folder: Path, repo: str) -> str:
    """Send a folder's files in one commit; returns the address. A new repository is private. Raises UserError."""
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repo, private=True, exist_ok=True)
        sent = hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Stitched by gptailor")
        return str(sent.commit_url)
    except (OSError, HTTPError) as error:  # offline, not signed in, not allowed, or the network broke
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else lines[0][:200]
        raise UserError(
            f"push: {repo} could not be sent to the hub ({reason}); sign in with `hf auth login` or set HF_TOKEN, and "
            f"try again: {folder} stays as it is"
        ) from error
