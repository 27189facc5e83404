"""Uploading an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def check_push(name: str) -> None:
    """Before any work: a name that the hub takes, the hub in reach, and somebody logged in.

    Raises:
        ValueError: one of these is not so.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:  # HFValidationError is one
        raise ValueError(f"--push_to_hub {name}: {error}; give organisation/name") from None
    if constants.is_offline_mode():
        raise ValueError(f"--push_to_hub {name}: HF_HUB_OFFLINE is set; unset it, or leave --push_to_hub out")
    with_hub(name, lambda: HfApi().whoami())


def push(folder: Path, name: str, private: bool) -> str:
    """Upload the folder as it is.

    Returns:
        The address of the repository.

    Raises:
        ValueError: the hub refuses or is out of reach; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    created = with_hub(name, lambda: api.create_repo(name, private=private, exist_ok=True, repo_type="model"))
    with_hub(
        name,
        lambda: api.upload_folder(
            folder_path=str(folder), repo_id=created.repo_id, repo_type="model", commit_message="Upload the model"
        ),
    )
    return str(created)


def with_hub(name: str, call: Any) -> Any:
    """Raises: ValueError: whatever the hub or the way there answered, in one line."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        return call()
    except LocalTokenNotFoundError:
        reason = "nobody is logged in; run hf auth login, or set HF_TOKEN"
    except Exception as error:  # the hub's own errors, the network's, the proxy's
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}; check the network and the rights"
    raise ValueError(f"--push_to_hub {name}: {reason}")
