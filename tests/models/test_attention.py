"""Attention is what it is asked to be, on every family, and no family stays causal in silence."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, make_llm

from ullme.models import attention
from ullme.models.attention import packing
from ullme.models.attention.packed_rows import PackedRows
from ullme.utils.tiny_models import make_tiny

IDS = torch.tensor([[5, 9, 13, 21, 34, 55], [7, 8, 11, 12, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def first_states(model, run, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Position 0 of both rows, before and after each row's last token changes."""
    changed = IDS.clone()
    changed[0, 5], changed[1, 3] = 99, 98
    out = []
    for ids in (IDS, changed):
        hidden = run(model.base_model, ids, MASK, causal)
        out.append(hidden.flat[hidden.lengths.cumsum(0) - hidden.lengths])
    return out[0], out[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_first_token_sees_last_only_if_bidirectional(family):
    model = make_llm(family)
    assert attention.choose_path(model, causal=False) == "packed"
    with torch.no_grad():
        before, after = first_states(model, attention.run_packed, causal=False)
        assert ((before - after).abs().amax(1) > 1e-3).all()
        before, after = first_states(model, attention.run_packed, causal=True)
        torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_padded(family, causal):
    model = make_llm(family).double()
    attention.packing.install(model)
    with torch.no_grad():
        packed = attention.run_packed(model.base_model, IDS, MASK, causal)
        padded = attention.run_padded(model.base_model, IDS, MASK, causal)
        other = attention.run_padded(model.base_model, IDS, MASK, not causal)
    assert packed.lengths.tolist() == [6, 4]
    torch.testing.assert_close(packed.flat, padded.flat, rtol=1e-6, atol=1e-6)  # RoPE tables are float32
    assert (packed.flat - other.flat).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_padded_under_a_sliding_window(family, causal):
    ids = torch.arange(3, 43).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    outputs = {}
    for window in (3, None):
        model = make_llm(family, sliding_window=window or 4096)  # float32: gemma2's eager softmax overflows in float64
        attention.packing.install(model)
        with torch.no_grad():
            outputs[window] = attention.run_packed(model.base_model, ids, mask, causal).flat
            padded = attention.run_padded(model.base_model, ids, mask, causal).flat
        torch.testing.assert_close(outputs[window], padded, rtol=1e-5, atol=1e-5)
    assert (outputs[3] - outputs[None]).abs().max() > 1e-3  # the window mattered


@pytest.mark.parametrize("path", ["packed", "padded", "mask4d"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_side_does_not_matter(path, causal):
    model = make_llm("gpt2").double()  # learned positions: a shifted row would show
    attention.packing.install(model)
    run = attention.PATHS[path]
    left = IDS.clone()
    left[1] = IDS[1].roll(2)
    with torch.no_grad():
        right = run(model.base_model, IDS, MASK, causal)
        flipped = run(model.base_model, left, torch.stack([MASK[0], MASK[1].roll(2)]), causal)
    torch.testing.assert_close(right.flat, flipped.flat, rtol=0, atol=1e-12)


FALLBACKS = {
    "bloom": "flags",
    "codegen": "flags",
    "falcon": "flags",
    "gpt_neo": "flags",
    "gpt_neox_japanese": "flags",
    "gptj": "flags",
    "mpt": "flags",
    "nemotron": "flags",
    "stablelm": "flags",
    "llama4_text": "mask4d",
    "gpt_oss": "padded",
    "gemma3": "packed",
    "gemma4": "packed",
}


@pytest.mark.parametrize(("family", "path"), FALLBACKS.items())
def test_a_family_that_ignores_the_keyword_gets_a_path_that_works(family, path):
    model = make_tiny(family)
    assert attention.choose_path(model, causal=False) == path
    with torch.no_grad():
        before, after = first_states(model, attention.PATHS[path], causal=False)
    assert ((before - after).abs().amax(1) > 1e-3).all()


def test_a_family_that_stays_causal_is_refused_by_name_and_layer():
    model = make_tiny("openai-gpt")
    with pytest.raises(ValueError, match=r"'openai-gpt' backbone.*layers 0-1 of 2 stay causal.*attention: causal"):
        attention.choose_path(model, causal=False)
    assert attention.choose_path(model, causal=True) == "padded"


def test_a_family_that_fails_in_float64_is_refused_with_the_remedy():
    """transformers' XGLM puts the least float64 into a float32, as docs/backbones.md says."""
    with pytest.raises(ValueError, match=r"'xglm' backbone.*attention: causal, or set dtype: float32"):
        attention.choose_path(make_tiny("xglm").double(), causal=False)
    assert attention.choose_path(make_tiny("xglm"), causal=False) == "padded"


def test_one_causal_layer_is_found_behind_a_bidirectional_one():
    """What the first layer mixed in must not hide that the second one looks back only."""
    model = make_llm("llama")
    layer = model.base_model.layers[1].self_attn
    plain = layer.forward

    def disobeying(*args, **kwargs):
        return plain(*args, **{**kwargs, "is_causal": True, "attention_mask": None})

    layer.forward = disobeying
    with pytest.raises(ValueError, match=r"padded: layers 1 of 2 stay causal"):
        attention.choose_path(model, causal=False, path="padded")
    with pytest.raises(ValueError, match="packed: layers 1 of 2 stay causal"):
        attention.choose_path(model, causal=False, path="packed")


def test_no_attention_at_all_is_refused():
    with pytest.raises(ValueError, match="no layer has attention"):
        attention.choose_path(make_llm("mamba", expand=2), causal=False)


def test_packing_is_left_out_where_it_failed():
    model = make_llm("stablelm")
    attention.choose_path(model, causal=False)
    assert not model.config._attn_implementation.startswith("ullme")


def test_hybrid_warns_about_its_recurrent_layers(caplog):
    model = make_llm("llama")
    model.config.layer_types = ["full_attention", "conv"]
    layer = model.base_model.layers[1]
    # a layer whose output at a token depends on that token only, as if it had no attention
    layer.forward = lambda hidden_states, **kwargs: hidden_states
    assert attention.choose_path(model, causal=False) == "packed"
    assert "layers [1] are recurrent" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_forward_that_ignores_borders_is_found_in_any_dtype(dtype, monkeypatch):
    from ullme.models.attention.packed_rows import PackedRows

    honest = attention.packing.attention_without_varlen

    def leaky(q, k, v, rows, *rest):
        return honest(q, k, v, PackedRows([sum(rows.host_lengths)], q.device), *rest)

    model = make_llm("llama", initializer_range=0.02).to(dtype)
    assert attention.choose_path(model, causal=False) == "packed"
    monkeypatch.setattr(attention.packing, "attention_without_varlen", leaky)
    assert attention.choose_path(model, causal=False) == "padded"


@pytest.mark.parametrize(("family", "path"), [("llama4_text", "mask4d"), ("mistral", "packed"), ("gemma2", "packed")])
def test_the_probe_sees_windows_that_are_wider_than_its_rows(family, path):
    """Without short windows Llama 4 would be packed, and chunks forgotten in long texts."""
    wide = {"attention_chunk_size": 64} if family == "llama4_text" else {"sliding_window": 64}
    model = make_tiny(family, **wide)
    before = [dict(vars(m)) for m in (model.config, *model.modules())]
    assert attention.choose_path(model, causal=False) == path
    after = [vars(m) for m in (model.config, *model.modules())]
    for name in wide:
        assert [m.get(name) for m in before] == [m.get(name) for m in after]


@pytest.mark.parametrize(
    ("shared", "grouped"), [(False, False), (False, True), (True, True)], ids=["plain", "grouped", "shared"]
)
def test_masks_and_places_are_made_once_for_all_layers(shared, grouped, monkeypatch):
    """And the gathered groups give the gradients that rows give alone; plain rows need no masks."""
    made = []
    if grouped:
        monkeypatch.setattr(packing.plain_rows, "takes", lambda *_: False)
    original = packing._group_mask
    monkeypatch.setattr(packing, "_group_mask", lambda *a: made.append(a) or original(*a))
    model = make_llm("gpt2").double()  # Llama's norms compute in float32 whatever comes
    layers = attention.decoder_layers(model.base_model)
    assert len(layers) > 1
    packing.install(model)
    lengths = [5, 9, 8, 3, 8]
    parents = [-1, 0, 0, 0, 0] if shared else None
    tokens = torch.arange(3, 3 + sum(lengths))
    rows = PackedRows(lengths, tokens.device, parents)
    parameters = list(layers.parameters())
    hidden = attention.run_rows(model.base_model, tokens, rows, causal=shared)
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    found = torch.autograd.grad((hidden * weights).sum(), parameters)
    # a row that continues another is causal too; one without a parent needs no mask when causal
    assert len(made) == (0 if not grouped else len(rows.groups) - 1 if shared else len(rows.groups))

    pieces, scales = tokens.split(lengths), weights.split(lengths)
    total = weights.new_zeros(())
    for n, (piece, scale) in enumerate(zip(pieces, scales, strict=True)):
        front = pieces[0] if shared and n else piece[:0]
        row = torch.cat([front, piece])
        alone = attention.run_rows(model.base_model, row, PackedRows([len(row)], row.device), causal=shared)
        total = total + (alone[len(front) :] * scale).sum()
    expected = torch.autograd.grad(total, parameters)
    assert min(g.abs().max() for g in expected) > 1e-6
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
