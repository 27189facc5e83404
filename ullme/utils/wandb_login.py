"""Whether W&B would take what is logged, found out before the LLM is loaded."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit


def check_wandb_login(option: str, without: str = "give --trainer.logger CSVLogger") -> None:
    """Log in to W&B, unless a key is there or nothing is sent; a terminal is asked for the key.

    Args:
        option: that asks for W&B, for the message.
        without: what to do to log elsewhere, for the message.

    Raises:
        ValueError: nobody is logged in.
    """
    mode = os.environ.get("WANDB_MODE", "online").lower()
    if mode not in ("online", "run", "shared") or _has_key() or os.environ.get("WANDB_DISABLED"):
        return
    import wandb

    try:
        logged_in = wandb.login()
    except wandb.errors.Error:
        logged_in = False
    if not logged_in:
        raise ValueError(
            f"{option} logs to W&B, and nobody is logged in; run wandb login, or set WANDB_MODE=offline to log into "
            f"files, or {without}"
        )


def _has_key() -> bool:
    """Whether an API key is in the environment or in .netrc, where ``wandb login`` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    files = [os.environ["NETRC"]] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    try:
        return any(os.path.isfile(file) and netrc.netrc(file).hosts.get(host) is not None for file in files)
    except (OSError, netrc.NetrcParseError):
        return False
