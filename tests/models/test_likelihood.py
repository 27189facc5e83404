"""log π(p|q) against transformers' own logits, for every family; shared prompts; blocks; gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES

from ullme.models import likelihood
from ullme.prompts import pad_rows

PROMPTS = [[1, 10, 11, 12], [1, 20], [1, 30, 31, 32, 33, 34]]
TARGETS = [[40, 41, 42, 2], [50, 2], [60, 61, 62, 63, 64, 65, 2], [70, 71, 2], [80], [90, 91, 92, 2]]
OWNER = [0, 0, 0, 1, 1, 2]


def direct(model, token_logps: bool = False) -> torch.Tensor:
    """One row at a time through transformers' forward, whole logits."""
    out = []
    for owner, target in zip(OWNER, TARGETS, strict=True):
        ids = torch.tensor([PROMPTS[owner] + target])
        logps = model(ids, is_generate=True).logits[0].log_softmax(-1)
        first = len(PROMPTS[owner])
        out.append(sum(logps[first + n - 1, token] for n, token in enumerate(target)))
    return torch.stack(out)


def scored(model, share: bool = True):
    prompts, targets = pad_rows(PROMPTS, 0), pad_rows(TARGETS, 0)
    return model(
        prompts.input_ids,
        prompts.attention_mask,
        is_generate=True,
        targets=targets,
        owner=torch.tensor(OWNER),
        share_prompts=share,
    )


@pytest.mark.parametrize("family", [*FAMILIES, "stablelm", "cohere", "granite"])
@pytest.mark.parametrize("share", [True, False])
def test_equals_transformers_logits(family, share, make_model):
    sizes = {"logit_scale": 0.3} if family == "cohere" else {"logits_scaling": 4.0} if family == "granite" else None
    model = make_model(family, sizes=sizes).eval()
    with torch.no_grad():
        found, expected = scored(model, share), direct(model)
    assert found.lengths.tolist() == [4, 2, 7, 3, 1, 4]
    assert (expected < -1).all()
    torch.testing.assert_close(found.logps, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("share", [True, False])
def test_sliding_windows_reach_into_the_prompt(share, make_model):
    model = make_model("mistral", sizes={"sliding_window": 4}).eval()
    with torch.no_grad():
        found, expected = scored(model, share), direct(model)
        unlimited = scored(make_model("mistral", sizes={"sliding_window": None}).eval())
    torch.testing.assert_close(found.logps, expected, rtol=1e-5, atol=1e-4)
    assert (unlimited.logps - found.logps).abs().max() > 1e-2


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("lora_name", ["ullme", None])
def test_gradients_equal_the_direct_ones(share, checkpointing, lora_name, make_model, monkeypatch):
    monkeypatch.setitem(likelihood._BLOCK_LOGITS, "cpu", 64 * 304 // 64)  # smallest blocks: several of them
    monkeypatch.setattr(likelihood, "max", lambda a, b: 5, raising=False)
    weights = torch.arange(1.0, 7.0, dtype=torch.double)
    gradients = []
    for run in (direct, lambda m: scored(m, share).logps):
        model = make_model(gradient_checkpointing=checkpointing, lora_name=lora_name).double().train()
        (run(model) * weights).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    expected, found = gradients
    scale = max(g.abs().max() for g in expected.values())
    assert scale > 1e-2
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-6 * scale, name  # Llama's norms round to float32


def test_a_prompt_is_run_once_for_its_targets(make_model):
    model = make_model().eval()
    tokens = []
    model.causal_lm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    model._head_checked = True
    with torch.no_grad():
        scored(model, share=True)
        scored(model, share=False)
    bodies = sum(len(t) - 1 for t in TARGETS)
    assert tokens == [sum(map(len, PROMPTS)) + bodies, sum(len(PROMPTS[o]) for o in OWNER) + bodies]


def test_scores_do_not_depend_on_the_company(make_model):
    model = make_model().eval()
    with torch.no_grad():
        together = scored(model).logps
        for n, (owner, target) in enumerate(zip(OWNER, TARGETS, strict=True)):
            prompt = pad_rows([PROMPTS[owner]], 0)
            alone = model(prompt.input_ids, prompt.attention_mask, is_generate=True, targets=pad_rows([target], 0))
            torch.testing.assert_close(alone.logps[0], together[n], rtol=1e-5, atol=1e-5)


def test_the_adapter_counts_and_can_be_switched_off(make_model):
    model = make_model().eval()
    with torch.no_grad():
        on = scored(model).logps
        with model.adapters_off():
            off, expected = scored(model).logps, direct(model)
    assert (on - off).abs().max() > 1e-2
    torch.testing.assert_close(off, expected, rtol=1e-5, atol=1e-4)


def test_bfloat16_weights_give_float32_sums(make_model):
    model = make_model(dtype="bfloat16").eval()
    with torch.no_grad():
        assert scored(model).logps.dtype == torch.float32


def test_an_unknown_head_is_refused(make_model):
    model = make_model().eval()
    head = model.causal_lm.lm_head
    model.causal_lm.register_forward_hook(lambda m, a, out: out.__setitem__("logits", out.logits * 2))
    with pytest.raises(ValueError, match="'llama' backbone changes its logits"):
        scored(model)
    assert head is model.causal_lm.lm_head


def test_dropout_of_an_adapter_on_the_head_is_recomputed_as_it_was(make_model, monkeypatch):
    gradients = []
    for direct_call in (True, False):
        if direct_call:
            monkeypatch.setattr(likelihood, "checkpoint", lambda run, *args, **_: run(*args))
        else:
            monkeypatch.undo()
        model = make_model(lora_target_modules=["lm_head", "q_proj"], lora_dropout=0.5).double().train()
        torch.manual_seed(7)
        scored(model).logps.sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("lm_head" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-9)


def test_frozen_head_knows_its_gradient():
    """log softmax and its gradient, against autograd; a likely token's small gradient survives half precision."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30).requires_grad_(False)
    hidden, targets = torch.randn(6, 8), torch.arange(6)
    head.weight.data[0] = 3 * hidden[0]  # token 0 is near certain in row 0
    upstream = torch.arange(1.0, 7)

    def exact(states):
        return head.double()(states).log_softmax(-1)[torch.arange(6), targets]

    states = hidden.double().requires_grad_()
    expected = exact(states)
    (slope,) = torch.autograd.grad(expected, states, upstream.double())
    assert expected[0].exp() > 0.999
    assert slope[0].abs().max() < 0.01 * slope[1:].abs().max()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        states = hidden.to(dtype).requires_grad_()
        found = likelihood._frozen_head(states, head.to(dtype), targets)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        (gradient,) = torch.autograd.grad(found, states, upstream.to(found.dtype))
        for row in range(1, 6):
            assert (gradient[row].double() - slope[row]).norm() <= tolerance * slope[row].norm()
    assert gradient[0].abs().max() < 0.02 * gradient[1:].abs().max()


def test_frozen_and_trained_heads_agree(make_model, monkeypatch):
    """The head that knows its gradient gives what recomputation gives."""
    model = make_model().train()
    hidden = torch.randn(20, model.hidden_size)
    targets = torch.randint(0, 30, (20,))
    weights = torch.randn(20)
    slopes = []
    calls = []
    original = likelihood._frozen_head
    monkeypatch.setattr(likelihood, "_frozen_head", lambda *a: calls.append(1) or original(*a))
    for changes in (False, True):
        monkeypatch.setattr(likelihood, "_changes_logits", lambda _, changes=changes: changes)
        states = hidden.clone().requires_grad_()
        (likelihood.token_log_probabilities(model.causal_lm, states, targets) * weights).sum().backward()
        slopes.append(states.grad)
    assert len(calls) == 1
    assert slopes[0].abs().max() > 1e-3
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=1e-6)
