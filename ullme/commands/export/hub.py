"""Uploading an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def check_push(name: str) -> None:
    """Check the repository's name, the connection to the hub and the login before any work.

    Raises:
        ValueError: one of them is not in order.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:  # HFValidationError is one
        raise ValueError(f"--push_to_hub {name}: {error}; give organisation/name") from None
    if constants.is_offline_mode():
        raise ValueError(f"--push_to_hub {name}: HF_HUB_OFFLINE is set; unset it, or leave --push_to_hub out")
    call_hub(name, lambda: HfApi().whoami())


def push(folder: Path, name: str, private: bool) -> str:
    """Upload the folder as it is.

    Returns:
        The address of the repository.

    Raises:
        ValueError: the hub refuses or cannot be reached; the folder is kept.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    created = call_hub(name, lambda: api.create_repo(name, private=private, exist_ok=True, repo_type="model"))
    call_hub(
        name,
        lambda: api.upload_folder(
            folder_path=str(folder), repo_id=created.repo_id, repo_type="model", commit_message="Upload the model"
        ),
    )
    return str(created)


def call_hub(name: str, call: Any) -> Any:
    """Call the hub. Raises: ValueError: its error or the network's, in one line."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        return call()
    except LocalTokenNotFoundError:
        reason = "not logged in; run hf auth login, or set HF_TOKEN"
    except Exception as error:  # the hub's own errors, the network's, the proxy's
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}; check the network and your permissions"
    raise ValueError(f"--push_to_hub {name}: {reason}")
