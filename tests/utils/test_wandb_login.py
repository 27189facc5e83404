"""Runs that log to W&B without a login end before anything is computed, with what to do."""

from __future__ import annotations

import pytest

from ullme.commands import train
from ullme.utils.wandb_login import check_wandb_login


@pytest.fixture
def not_logged_in(tmp_path, monkeypatch):
    import wandb

    def no_login():
        raise wandb.errors.UsageError("no API key configured")

    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(wandb, "login", no_login)


def test_without_a_login_to_wandb_the_remedies_are_named_before_the_llm_is_loaded(capsys, monkeypatch, not_logged_in):
    monkeypatch.setattr(train.ULLMECLI, "instantiate_classes", lambda _: pytest.fail("classes were instantiated"))
    given = ["--model.backbone.model_name_or_path=llm", "--data.train=rows.jsonl", "--loss.chunk_size=2"]
    with pytest.raises(SystemExit) as end:
        train.main(["fit", *given, "--trainer.logger=WandbLogger"])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert all(remedy in message for remedy in ("wandb login", "WANDB_MODE=offline", "CSVLogger"))


def test_a_key_of_wandb_or_an_offline_mode_is_enough(not_logged_in, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nobody is logged in"):
        check_wandb_login("x")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("WANDB_API_KEY", "k" * 40)):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            check_wandb_login("x")
    (tmp_path / ".netrc").write_text("machine elsewhere.org\n  login user\n  password " + "k" * 40)
    with pytest.raises(ValueError, match="nobody is logged in"):
        check_wandb_login("x")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "k" * 40)
    check_wandb_login("x")
