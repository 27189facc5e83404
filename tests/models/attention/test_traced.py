"""Packed attention in torch.compile: one graph a layer for all lengths, with the numbers of the uncompiled model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ullme.models.attention import packing, traced
from ullme.models.attention.packed_rows import PackedRows

CPU = torch.device("cpu")
# First, numbers that the toy has nowhere else: torch takes sizes that are equal when it traces for one and the same.
LENGTHS = ([5, 9, 3, 6, 5], [4, 4, 17, 2, 8, 3, 3], [30, 3], [6, 7, 9, 11])
CASES: dict[str, tuple[bool, int | None, float | None]] = {
    "causal": (True, None, None),
    "bidirectional": (False, None, None),
    "window": (False, 2, None),
    "softcap": (True, None, 5.0),
}


@pytest.fixture
def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, 14, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]


@pytest.mark.parametrize("parents", [None, [-1, 0, 0]])
@pytest.mark.parametrize("case", CASES)
def test_operation_is_the_grouped_attention(case, parents, inputs):
    """Values and gradients to the last bit."""
    causal, window, softcap = CASES[case]
    rows = PackedRows([3, 6, 5], CPU, parents)
    found = []
    for compute in (
        lambda *x: packing.attention_without_varlen(*x, rows, None, causal, window, softcap, 0.0),
        lambda *x: traced.packed_attention(*x, rows.layout, None, causal, window or 0, softcap or 0.0),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = compute(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out.pow(3).sum(), leaves)])
    assert all(x.abs().max() > 0.1 for x in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dropout_depends_on_its_seed_only(inputs):
    """Values and gradients of the groups with the same random numbers; other numbers are drawn as if nothing had been."""
    rows = PackedRows([3, 6, 5], CPU)

    def run(compute: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = compute(*leaves)
        return [out.detach(), *torch.autograd.grad(out.pow(3).sum(), leaves)]

    def by_operation(seed: int) -> list[Tensor]:
        options = (rows.layout, None, False, 0, 0.0, 0.4, torch.tensor(seed))
        return run(lambda *x: traced.packed_attention(*x, *options))

    def in_groups(*x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return packing._grouped_attention(*x, rows, None, False, None, None, 0.4)

    expected = run(in_groups)
    before = torch.get_rng_state()
    found, other = by_operation(7), by_operation(8)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


def test_seeds_are_drawn_from_the_random_state():
    state = torch.get_rng_state()
    first = traced.new_seed()
    assert traced.new_seed() != first
    torch.set_rng_state(state)
    assert traced.new_seed() == first


def test_operation_is_well_formed(inputs):
    """Shapes of the fake operation, no hidden mutation or alias, a gradient of its own."""
    args = (*(x.requires_grad_() for x in inputs), PackedRows([9, 5], CPU).layout, None, False, 0, 0.0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(traced.packed_attention, args, test_utils=tests)


@pytest.fixture
def compile_with(monkeypatch):
    """Lets ULLME compile its layers with another backend, and without graph breaks: these raise."""
    torch._dynamo.reset()
    counters.clear()
    plain = nn.Module.compile

    def use(backend: str) -> None:
        def compile_layer(self: nn.Module, dynamic: bool, options: Any) -> None:
            plain(self, dynamic=dynamic, backend=backend, fullgraph=True)

        monkeypatch.setattr(nn.Module, "compile", compile_layer)

    yield use
    torch._dynamo.reset()
    counters.clear()


def gradients(model: Any, lengths: list[int]) -> list[Tensor]:
    """Embeddings of rows of these lengths, and the gradients of all trained weights."""
    longest = max(lengths)
    ids = torch.arange(len(lengths) * longest).view(len(lengths), longest) * 7 % 290 + 3
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    model.zero_grad()
    reps = model(ids, mask)["rep"]
    reps[:, :3].sum().backward()
    return [reps.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def compare(plain: Any, compiled: Any) -> None:
    """Same numbers, as many graphs after the last lengths as after the first, and no break."""
    graphs = []
    for lengths in LENGTHS:
        found, expected = gradients(compiled, lengths), gradients(plain, lengths)
        graphs.append(counters["stats"]["unique_graphs"])
        assert max(gradient.abs().max() for gradient in expected[1:]) > 1e-3
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert set(graphs) == {graphs[0]}
    assert 1 <= graphs[0] <= len(plain.causal_lm.base_model.layers)
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_attention_dropout_is_in_the_graph(backend, make_model, compile_with):
    """No break, the same dropout from the same random state, another one from another."""
    compile_with(backend)
    model = make_model("phi", compile=True, dtype="float64", attention_dropout=0.3).double().train()
    state = torch.get_rng_state()
    first, other = gradients(model, LENGTHS[0]), gradients(model, LENGTHS[0])
    torch.set_rng_state(state)
    again = gradients(model, LENGTHS[0])
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert (first[0] - other[0]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_for_all_lengths(backend, checkpointing, make_model, compile_with):
    compile_with(backend)
    options: dict[str, Any] = {"dtype": "float64", "gradient_checkpointing": checkpointing}
    plain, compiled = (make_model("phi", compile=on, **options).double().train() for on in (False, True))
    compare(plain, compiled)


def blocks_of_rows(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most: int, most_keys: int, **options: Any
) -> Tensor:
    """torch's kernel for rows of different lengths, (T, H, head_dim), as one masked attention."""
    row, row_k = ((torch.arange(len(x))[:, None] >= cu).sum(1) for cu, x in ((cu_q, q), (cu_k, k)))
    mask = row[:, None] == row_k
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    attend = nn.functional.scaled_dot_product_attention
    return attend(q, k, v, mask, scale=options["scale"], enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.slow
def test_the_kernel_of_a_gpu_is_traced(make_model, compile_with, monkeypatch):
    """With a stand-in for the kernel, which is itself an operation of torch."""
    compile_with("eager")
    plain, compiled = (make_model("phi", compile=on, dtype="float64").double().train() for on in (False, True))
    expected = gradients(plain, LENGTHS[0])
    monkeypatch.setattr(packing, "_on_cuda", lambda _: True)
    monkeypatch.setattr(packing, "_kernel_takes", lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", blocks_of_rows)
    monkeypatch.setattr(packing, "_varlen_has_parameter", lambda name: name == "window_size")
    for a, b in zip(gradients(plain, LENGTHS[0]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    compare(plain, compiled)
