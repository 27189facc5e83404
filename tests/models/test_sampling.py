"""Sampling from an LLM with random numbers of each row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import make_readable_tokenizer

from ullme.models.sampling import draw, ending_tokens, sample_lines


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=torch.float64).log().repeat(5, 1)
    uniforms = torch.tensor([0.0, 0.4999, 0.5, 0.7001, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniforms).tolist() == [0, 0, 2, 3, 3]  # borders at 0.5, 0.5, 0.7 and 1
    assert draw(logits[:, [1, 0, 3, 2]], uniforms).tolist() == [1, 1, 2, 2, 3]  # 0, 0.5, 0.8, 1


def test_temperature():
    logits = torch.tensor([[0.6, 0.4]], dtype=torch.float64).log()
    half = torch.tensor([0.65], dtype=torch.float64)
    assert draw(logits, half).item() == 1
    assert draw(logits, half, temperature=0.5).item() == 0  # 0.36 / (0.36 + 0.16) = 0.692
    assert draw(logits, torch.tensor([0.999], dtype=torch.float64), temperature=0.0).item() == 0


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([[0.1, 0.3, 0.4, 0.2]], dtype=torch.float64).log()
    drawn = {
        p: {draw(logits, torch.tensor([u]).double(), 1.0, p).item() for u in np.linspace(0, 0.999, 50)}
        for p in (0.3, 0.65, 0.85, 1.0)
    }
    assert drawn == {0.3: {2}, 0.65: {1, 2}, 0.85: {1, 2, 3}, 1.0: {0, 1, 2, 3}}


def test_ending_tokens():
    tokenizer = make_readable_tokenizer()
    ends = ending_tokens(tokenizer, 304, [5])
    ids = set(ends.nonzero()[:, 0].tolist())
    assert ids == {tokenizer("\n", add_special_tokens=False)["input_ids"][0], tokenizer.eos_token_id, 5}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = make_readable_tokenizer()
    return tokenizer(["The river", "A query asks: who founded the town?", "short", "Numbers such as 1984"])["input_ids"]


@pytest.fixture
def model(make_model):
    model = make_model()
    model.tokenizer = make_readable_tokenizer()
    return model


def test_a_row_does_not_depend_on_the_others(model, prompts):
    uniforms = np.random.default_rng(0).random((4, 12))
    ends = ending_tokens(model.tokenizer, 304)
    together = sample_lines(model, prompts, uniforms, ends, 0.8, 0.95)
    apart = [sample_lines(model, [row], u[None], ends, 0.8, 0.95)[0] for row, u in zip(prompts, uniforms, strict=True)]
    assert together == apart
    assert len(set(together)) == 4
    assert sample_lines(model, prompts, np.random.default_rng(1).random((4, 12)), ends, 0.8, 0.95) != together


def test_the_llm_without_its_adapter_writes(model, prompts):
    """Greedy, token by token, with the plain LLM and no cache."""
    end = model.tokenizer.eos_token_id
    ends = torch.arange(304) == end
    found = sample_lines(model, prompts, np.zeros((4, 8)), ends, temperature=0.0)
    expected, with_adapter = [], []
    for out, off in ((expected, True), (with_adapter, False)):
        for row in prompts:
            ids = torch.tensor([row])
            while len(ids[0]) < len(row) + 8 and ids[0, -1] != end:
                with torch.no_grad(), model.adapters_off() if off else torch.no_grad():
                    logits = model(ids, is_generate=True).logits[0, -1]
                if len(ids[0]) == len(row):
                    logits[end] = -torch.inf
                ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
            text = model.tokenizer.decode(ids[0, len(row) :], skip_special_tokens=True)
            out.append(" ".join((text.strip().splitlines() or [""])[0].split()))
    assert found == expected
    assert found != with_adapter


def test_a_line_ends_at_its_break(model, prompts):
    """The LLM always wants a line break, then two letters, whatever was before."""
    tokenizer = model.tokenizer
    line = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("\n", "a", "b")]
    calls = []

    def logits(module, inputs, output):
        calls.append(1)
        scores = torch.full_like(output.logits, -100.0)
        scores[..., [line[1], line[2], line[0]][len(calls) - 1]] = 0.0
        if len(calls) == 1:
            scores[..., line[0]] = 99.0  # a line must not begin with its end
        output.logits = scores
        return output

    hook = model.causal_lm.register_forward_hook(logits)
    try:
        ends = ending_tokens(tokenizer, 304)
        assert sample_lines(model, prompts[:2], np.full((2, 5), 0.5), ends) == ["ab", "ab"]
    finally:
        hook.remove()
    assert len(calls) == 3  # nothing is generated behind the break
