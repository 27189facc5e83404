"""A run that starts from an earlier run's weights."""

from __future__ import annotations

import pytest
import torch

from ullme.models.checkpoint import load_ullme, save_adapter
from ullme.models.trained_weights import CONTRACT_KEY, STATE_PREFIX, check_can_resume, contract, trainable_state

TEXTS = ["the mill by the river", "a market"]


def saved(model, path, shift: float = 0.0) -> str:
    """A checkpoint of the model, its trained weights moved so that they matter."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * shift)
    state = {STATE_PREFIX + name: value.clone() for name, value in trainable_state(model).items()}
    torch.save({CONTRACT_KEY: contract(model), "state_dict": state}, path)
    return str(path)


@pytest.fixture
def first(make_model, tmp_path):
    model = make_model().eval()
    return model, saved(model, tmp_path / "first.ckpt", 0.05)


def far(a, b) -> float:
    return float(abs(a - b).max())


def test_merging_starts_where_the_earlier_run_ended(first, make_model, tmp_path):
    earlier, path = first
    fresh = make_model(init_from=path, lora_r=8).eval()  # make_model moves the new adapter away from zero
    with fresh.adapters_off():
        assert far(fresh.encode(TEXTS), earlier.encode(TEXTS)) < 1e-5
        assert far(make_model(lora_name=None).encode(TEXTS), earlier.encode(TEXTS)) > 1e-3
    assert far(fresh.encode(TEXTS), earlier.encode(TEXTS)) > 1e-3
    assert all("lora_" in name for name in trainable_state(fresh))


def test_a_third_stage_on_a_second_rebuilds_from_its_checkpoint_alone(first, make_model, tmp_path):
    second = make_model(init_from=first[1]).eval()
    path = saved(second, tmp_path / "second.ckpt", 0.05)
    again = load_ullme(path)
    assert far(again.encode(TEXTS), second.encode(TEXTS)) < 1e-6
    third = make_model(init_from=path).eval()
    with third.adapters_off():
        assert far(third.encode(TEXTS), second.encode(TEXTS)) < 1e-5
    assert far(load_ullme(saved(third, tmp_path / "third.ckpt", 0.05)).encode(TEXTS), third.encode(TEXTS)) < 1e-6


def test_continuing_goes_on_with_the_same_weights(first, make_model, tmp_path):
    earlier, path = first
    continued = make_model(init_from=path, init_mode="continue", lora_name="other").eval()
    mine = {n.replace(".other.", "."): p for n, p in trainable_state(continued).items() if "lora_A" in n}
    theirs = {n.replace(".ullme.", "."): p for n, p in trainable_state(earlier).items() if "lora_A" in n}
    assert mine
    assert all(torch.equal(mine[n], theirs[n]) for n in theirs)  # lora_B is what make_model moves
    with continued.adapters_off():
        assert far(continued.encode(TEXTS), earlier.encode(TEXTS)) > 1e-3
    assert contract(continued)["backbone"]["init_from"] is None  # its checkpoint holds everything
    assert continued.fingerprint == earlier.fingerprint


def test_biases_then_an_adapter(make_model, tmp_path):
    earlier = make_model("gpt2", lora_name=None, train="biases").eval()
    path = saved(earlier, tmp_path / "b.ckpt", 0.1)
    later = make_model("gpt2", init_from=path).eval()
    with later.adapters_off():
        assert far(later.encode(TEXTS), earlier.encode(TEXTS)) < 1e-6


def test_an_adapter_folder_will_do(first, make_model, tmp_path):
    folder = save_adapter(first[0], tmp_path / "adapter")
    later = make_model(init_from=str(folder)).eval()
    with later.adapters_off():
        assert far(later.encode(TEXTS), first[0].encode(TEXTS)) < 1e-5


@pytest.mark.parametrize("mode", ["merge", "continue"])
def test_latent_attention_goes_on(mode, make_model, tmp_path):
    options = {"pooling": "latent_attention", "latents": 4, "latent_heads": 2}
    earlier = make_model(**options).eval()
    later = make_model(init_from=saved(earlier, tmp_path / "l.ckpt", 0.1), init_mode=mode, **options)
    for a, b in zip(later.pooler.parameters(), earlier.pooler.parameters(), strict=True):
        assert torch.equal(a, b)
    if mode == "merge":
        with pytest.raises(ValueError, match="latent attention of another shape than latents=5"):
            make_model(init_from=str(tmp_path / "l.ckpt"), **{**options, "latents": 5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": {"hidden_size": 64}}, "was trained with hidden_size=32"),
        ({"sizes": {"rms_norm_eps": 0.1}}, r"another configuration \(rms_norm_eps is 0.1 and was 1e-06\) than"),
        ({"sizes": {"initializer_range": 0.1}}, "holds other weights than"),
        ({"init_mode": "continue", "lora_r": 8}, "was trained with lora_r=4"),
        ({"init_mode": "continue", "lora_name": None}, "does not fit the model"),
        ({"init_mode": "start"}, "init_mode='start': choose merge or continue"),
    ],
)
def test_mismatches_are_refused(first, make_model, options, message):
    with pytest.raises(ValueError, match=message):
        make_model(init_from=first[1], **options)


def edited(path: str, change) -> str:
    """The checkpoint with another contract."""
    stored = torch.load(path)
    change(stored[CONTRACT_KEY])
    stored[CONTRACT_KEY]["fingerprint"] = "another"
    torch.save(stored, path)
    return path


def test_another_version_of_transformers_is_no_other_llm(first, make_model):
    """Whose configuration has fields more and less."""

    def other_fields(known):
        del known["llm"]["config"]["pretraining_tp"]
        known["llm"]["config"] |= {"new_field": 3, "rope_parameters": {"rope_theta": 10000.0, "new_field": 4}}

    path = edited(first[1], other_fields)
    assert far(load_ullme(path, strict=True).encode(TEXTS), first[0].encode(TEXTS)) < 1e-6
    check_can_resume(first[0], torch.load(path))
    with make_model(init_from=path).eval().adapters_off():
        pass


def test_the_configuration_counts_field_by_field(first):
    path = edited(first[1], lambda known: known["llm"]["config"]["rope_parameters"].update(rope_theta=5.0))
    with pytest.raises(
        ValueError, match=r"another configuration \(rope_parameters.rope_theta is 10000.0 and was 5.0\)"
    ):
        check_can_resume(first[0], torch.load(path))


def test_a_checkpoint_of_an_earlier_version_knows_the_fingerprint_alone(first):
    path = edited(first[1], lambda known: known.pop("llm"))
    with pytest.raises(
        ValueError, match=r"other weights \(or another version of transformers reads its config\.json\)"
    ):
        load_ullme(path, strict=True)


def test_no_such_run(make_model):
    with pytest.raises(ValueError, match="init_from='nowhere', init_mode=merge: checkpoint='nowhere': no such file"):
        make_model(init_from="nowhere")
