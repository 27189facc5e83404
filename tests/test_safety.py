"""No code from a checkpoint, no secret in a file."""

from __future__ import annotations

import pytest
import torch
from bad_world import Payload
from test_training import arguments  # noqa: F401 - a fixture

from ullme.commands import train
from ullme.models.checkpoint import load_ullme
from ullme.training.resume import redacted
from ullme.utils import atomic_files


def test_a_checkpoint_cannot_ask_for_the_models_own_code(arguments, tmp_path, monkeypatch):  # noqa: F811
    """The options in a checkpoint rebuild its model, except the one that would run what a stranger wrote."""
    train.main(arguments("run", "--trainer.max_steps=1"))
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    stored = atomic_files.read(path)
    stored["ullme"]["backbone"]["trust_remote_code"] = True
    atomic_files.save(stored, path)
    assert load_ullme(path).options.trust_remote_code is False
    assert load_ullme(path, trust_remote_code=True).options.trust_remote_code is True
    stored["ullme"]["backbone"]["hook"] = "os.system"
    atomic_files.save(stored, path)
    with pytest.raises(ValueError, match=r"another version: it has the options \['hook'\]"):
        load_ullme(path)


def test_resuming_from_a_payload_does_not_run_it(arguments, tmp_path, capsys):  # noqa: F811
    train.main(arguments("run", "--trainer.max_steps=2", "--checkpoint.every_n_train_steps=1"))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    torch.save({**atomic_files.read(last), "optimizer_states": Payload(tmp_path / "flag")}, last)
    for extra in ("--ckpt_path=last", f"--ckpt_path={last}"):
        with pytest.raises(SystemExit):
            train.main(arguments("run", "--trainer.max_steps=3", extra))
        assert "refused because loading them would run code" in capsys.readouterr().err
    assert not (tmp_path / "flag").exists()


def test_secrets_reach_no_file_and_no_output(arguments, tmp_path, monkeypatch, capfd):  # noqa: F811
    secrets = {
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "HF_TOKEN": "hf_aVeryPrivateToken",
        "MY_PASSWORD": "swordfish123",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    dropped = [a for a in arguments("run", "--trainer.max_steps=1") if "logger" not in a]
    logger = ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true", f"--trainer.logger.save_dir={tmp_path}"]
    train.main([*dropped, *logger, "--trainer.logger.notes=swordfish123"])
    said = "".join(capfd.readouterr())
    import wandb

    wandb.finish()  # else the next test's logger would write into this run
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {p.name for p in files} >= {"config.yaml", "last.ckpt"}
    for secret in secrets.values():
        assert secret not in said
        assert not [p for p in files if secret.encode() in p.read_bytes()]
    assert len((tmp_path / "run" / "wandb_run_id").read_text()) == 12
    logged = [p for p in tmp_path.glob("wandb/**/*") if p.is_file()]
    assert logged
    for secret in (secrets["WANDB_API_KEY"], secrets["HF_TOKEN"]):
        assert not [p for p in logged if secret.encode() in p.read_bytes()]


def test_redacted_keeps_everything_else(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_aVeryPrivateToken")
    config = {
        "loss": {"chunk_tokens": 16, "temperature": 0.05},
        "tokens": ["a"],
        "logger": {"api_key": "abc", "settings": {"token": "abc", "password": None}, "name": "run"},
        "url": ["https://user:hf_aVeryPrivateToken@host/x"],
    }
    assert redacted(config) == {
        **config,
        "logger": {"api_key": "(not saved)", "settings": {"token": "(not saved)", "password": None}, "name": "run"},
        "url": ["(not saved)"],
    }
