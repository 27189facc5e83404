"""The LoRA layer equals PEFT's own, forward and backward, on every path it can take."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from ullme.models import lora
from ullme.models.lora import LoraLinear

IN, OUT, RANK = 12, 20, 4
FEW, MANY = 3, 40  # rows: too few to merge, enough to merge


def make_layers(dropout: float = 0.0, bias: bool = False, dtype: torch.dtype = torch.float64, **options):
    """(PEFT's layer, ours) with the same weights; the adapter is not the identity."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=bias)).to(dtype)
    config = LoraConfig(r=RANK, lora_alpha=7, lora_dropout=dropout, target_modules=["0"], **options)
    theirs = get_peft_model(model, config, autocast_adapter_dtype=dtype is torch.float64).base_model.model
    nn.init.normal_(theirs[0].lora_B["default"].weight)
    ours = copy.deepcopy(theirs)
    lora.install(ours)
    assert type(theirs[0]) is Linear
    assert type(ours[0]) is LoraLinear
    return theirs[0], ours[0]


def run(layer, x, weights):
    """Output and the gradients of x, A and B; the random state is the same for all."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * weights).sum().backward()
    found = [out.detach(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equals_peft(rows, bias, dropout):
    theirs, ours = make_layers(dropout, bias)
    x, weights = torch.randn(2, rows, IN).double(), torch.randn(2, rows, OUT).double()
    expected, found = run(theirs, x, weights), run(ours, x, weights)
    bare = theirs.base_layer(x)
    assert (expected[0] - bare).abs().max() > 0.1  # the adapter does something
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_dropout_keeps_a_mask_and_not_a_second_input():
    _, ours = make_layers(dropout=0.4)
    x = torch.randn(MANY, IN, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(x)
    of_input_size = [t for t in kept if t.shape == x.shape]
    assert {t.dtype for t in of_input_size} == {torch.float64, torch.bool}
    assert [t.data_ptr() for t in of_input_size if t.dtype != torch.bool] == [x.data_ptr()]


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
def test_gradients_by_finite_differences(rows):
    _, ours = make_layers()
    a, b = ours.lora_A["default"].weight, ours.lora_B["default"].weight
    x = torch.randn(rows, IN, dtype=torch.float64, requires_grad=True)

    def function(x, a, b):
        return torch.func.functional_call(ours, {"lora_A.default.weight": a, "lora_B.default.weight": b}, (x,))

    assert torch.autograd.gradcheck(function, (x, a.detach().requires_grad_(), b.detach().requires_grad_()))


def test_many_rows_merge_and_few_do_not():
    weight = torch.empty(OUT, IN)
    many, few = torch.randn(MANY, IN), torch.randn(FEW, IN)
    assert lora._merging_is_cheaper(many, weight)
    assert not lora._merging_is_cheaper(few, weight)
    assert not lora._merging_is_cheaper(many, weight.bfloat16())  # the update would be rounded away


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast):
    """As near to the float64 result as PEFT's layer is, and gradients stay in the adapter's dtype."""
    theirs, ours = make_layers()
    x, weights = torch.randn(MANY, IN), torch.randn(MANY, OUT)
    exact = run(theirs, x.double(), weights.double())
    dtype = torch.float32 if autocast else torch.bfloat16
    for layer in (theirs, ours):
        layer.to(torch.float32)
        layer.base_layer.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        peft, found = run(theirs, x.to(dtype), weights), run(ours, x.to(dtype), weights)
    assert found[0].dtype == torch.bfloat16
    assert found[2].dtype == found[3].dtype == torch.float32
    for a, b, c in zip(found, peft, exact, strict=True):
        scale = c.abs().max()
        assert (a - c).abs().max() / scale < max(0.02, 2 * float((b - c).abs().max() / scale))


def test_other_cases_are_pefts():
    theirs, ours = make_layers()
    x = torch.randn(MANY, IN).double()
    assert ours._single_plain_adapter() == "default"
    ours.enable_adapters(False)
    assert ours._single_plain_adapter() is None
    torch.testing.assert_close(ours(x), ours.base_layer(x))
    ours.enable_adapters(True)
    ours.merge()
    assert ours._single_plain_adapter() is None
    torch.testing.assert_close(ours(x), theirs(x))
    _, dora = make_layers(use_dora=True)
    assert dora._single_plain_adapter() is None


def test_input_without_gradient():
    """The first layer's input is a frozen embedding's output."""
    theirs, ours = make_layers()
    x = torch.randn(MANY, IN).double()
    for layer in (theirs, ours):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours.lora_A["default"].weight.grad, theirs.lora_A["default"].weight.grad)
    assert ours.lora_A["default"].weight.grad.abs().max() > 0


def test_every_linear_layer_of_a_llm_is_ours(make_model):
    model = make_model()
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    assert len(layers) >= 7
    assert all(type(m) is LoraLinear and m._single_plain_adapter() for m in layers)


def test_dropout_is_where_it_can_be(tmp_path, caplog):
    """In every linear layer; PEFT refuses it for experts, so the config that is saved with them has none."""
    from ullme.models.config import BackboneConfig
    from ullme.models.loading import add_adapter
    from ullme.utils.tiny_models import make_tiny

    dense = add_adapter(make_tiny("llama"), BackboneConfig("tiny", lora_r=2))
    found = [m.lora_dropout["ullme"] for m in dense.modules() if isinstance(m, Linear)]
    assert found
    assert all(isinstance(dropout, nn.Dropout) and dropout.p == 0.2 for dropout in found)
    assert dense.peft_config["ullme"].lora_dropout == 0.2
    assert not caplog.records
    experts = add_adapter(make_tiny("mixtral"), BackboneConfig("tiny", lora_r=2))
    linear = [m.lora_dropout["ullme"] for m in experts.modules() if isinstance(m, Linear)]
    wrapped = [m.lora_dropout["ullme"] for m in experts.modules() if isinstance(m, ParamWrapper)]
    assert linear
    assert wrapped
    assert all(dropout.p == 0.2 for dropout in linear)
    assert not any(isinstance(dropout, nn.Dropout) for dropout in wrapped)
    assert experts.peft_config["ullme"].lora_dropout == 0
    assert "adapters of experts have no dropout" in caplog.text
