"""Uploading, against a hub that is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pytest

from ullme.commands.export import hub


class Hub:
    """What of HfApi is used, and what it was asked."""

    asked: ClassVar[list] = []
    error: Exception | None = None

    def whoami(self):
        self._ask("whoami")

    def create_repo(self, name, **options):
        self._ask("create_repo", name, options)
        return SimpleNamespace(repo_id=f"me/{name}", __str__=lambda self: "address")

    def upload_folder(self, **options):
        self._ask("upload_folder", options)

    def _ask(self, *what):
        if self.error is not None:
            raise self.error
        self.asked.append(what)


@pytest.fixture
def fake_hub(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    return Hub


def test_the_folder_is_uploaded(fake_hub, tmp_path):
    hub.push(tmp_path, "model", private=True)
    (_, name, made), (_, sent) = fake_hub.asked
    assert (name, made["private"], made["exist_ok"]) == ("model", True, True)
    assert (sent["folder_path"], sent["repo_id"]) == (str(tmp_path), "me/model")


def test_errors_are_one_line(fake_hub, monkeypatch, tmp_path):
    from huggingface_hub.errors import LocalTokenNotFoundError

    for error, message in (
        (LocalTokenNotFoundError("Token is required\nlong advice"), "not logged in"),
        (ConnectionError("no\nroute"), "ConnectionError: no route"),
    ):
        monkeypatch.setattr(Hub, "error", error)
        for call in (lambda: hub.check_push("me/model"), lambda: hub.push(tmp_path, "me/model", private=False)):
            with pytest.raises(ValueError, match=message) as found:
                call()
            assert "\n" not in str(found.value)


def test_refused_before_any_work(fake_hub, monkeypatch):
    with pytest.raises(ValueError, match="give organisation/name"):
        hub.check_push("a/b/c")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        hub.check_push("me/model")
    assert fake_hub.asked == []
