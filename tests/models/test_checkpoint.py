"""Checkpoints and adapter folders: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ullme.models.checkpoint import load_ullme, load_weights, save_adapter


def test_adapter_folder_round_trip(make_model, tmp_path):
    model = make_model()
    folder = save_adapter(model, tmp_path / "adapter")
    texts = ["one text", "another"]
    np.testing.assert_array_equal(load_ullme(folder).encode(texts), model.encode(texts))
    fresh = make_model(lora_name="other")
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert np.abs(fresh.encode(texts) - model.encode(texts)).max() > 1e-3
    load_weights(fresh, folder)  # under another adapter name
    np.testing.assert_array_equal(fresh.encode(texts), model.encode(texts))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model.options.model_name_or_path), folder
    ).eval()
    ids = torch.tensor([[1, 5, 9]])
    torch.testing.assert_close(theirs(ids).logits, model.eval()(ids, is_generate=True).logits)


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    for content, message in ((b"", "cannot be read"), (b"PK\x03\x04 nonsense", "cannot be read")):
        (tmp_path / "x.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_ullme(tmp_path / "x.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="was not written by ullme"):
        load_ullme(tmp_path / "x.ckpt")
    torch.save({"ullme": Path("code")}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="loading them would run code"):
        load_ullme(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"give a run folder, a .ckpt file or a PEFT adapter folder"):
        load_ullme(tmp_path / "nothing")


def test_an_llm_that_is_no_longer_where_it_was_is_asked_for(make_model, llm_folder, tmp_path, monkeypatch):
    """As with a path that is relative to the folder in which the training was started."""
    monkeypatch.chdir(Path(llm_folder()).parent)
    model = make_model()
    model.options = replace(model.options, model_name_or_path=Path(llm_folder()).name)
    folder = save_adapter(model, tmp_path / "adapter")
    load_ullme(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"was trained on 'llm\d+', which is no folder here, .*say where .* \(--model\)"
    ):
        load_ullme(folder)
    load_ullme(folder, model_name_or_path=llm_folder())
