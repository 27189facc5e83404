"""Prompts that begin alike: their common tokens are read once, and what is written does not change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_readable_tokenizer, save_llm

from ullme.models import ULLME
from ullme.models.prefix_cache import common_prefix, encode_prefix
from ullme.models.sampling import ending_tokens, sample_lines

EXAMPLES = "The river Elba flows past the old mill and the market square.\n\n"
TEXTS = ("The river", "A query asks: who founded the town?", "short", "Numbers such as 1984")
LONGEST = 120


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return make_readable_tokenizer()([EXAMPLES + text for text in TEXTS])["input_ids"]


def float64_model(make_model, family="llama", **options):
    model = make_model(family, **options).double()
    model.tokenizer = make_readable_tokenizer()
    return model


def test_common_prefix():
    assert common_prefix([[1, 2, 3, 4], [1, 2, 5]]) == (1, 2)
    assert common_prefix([[1, 2], [1, 2, 3]]) == (1,)  # one token of each is left, whose logits are needed
    assert common_prefix([[1, 2, 3], [2, 2, 3]]) == ()
    assert common_prefix([]) == ()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_is_written(make_model, prompts, family, temperature):
    """Also with an adapter, which is off; a prefix of other tokens would have changed it."""
    model = float64_model(make_model, family)
    uniforms, ends = np.random.default_rng(0).random((4, 8)), ending_tokens(model.tokenizer, 304)
    prefix = encode_prefix(model, prompts, LONGEST)
    assert prefix is not None
    assert list(prefix.tokens) == prompts[0][: len(prefix.tokens)]
    whole = sample_lines(model, prompts, uniforms, ends, temperature)
    assert len(set(whole)) >= 3
    for _ in range(2):  # the second time from the same cache
        assert sample_lines(model, prompts, uniforms, ends, temperature, prefix=prefix) == whole
    changed = [[7 if token == prefix.tokens[4] else token for token in row] for row in prompts]
    other = encode_prefix(model, changed, LONGEST)
    wrong = replace(prefix, cache=other.cache)
    assert sample_lines(model, prompts, uniforms, ends, temperature, prefix=wrong) != whole


def test_the_prefix_is_not_read_again(make_model, prompts):
    model = float64_model(make_model, lora_name=None)
    prefix = encode_prefix(model, prompts, LONGEST)
    assert 30 < len(prefix.tokens) == len(common_prefix(prompts))
    read = []
    embeddings = model.causal_lm.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].shape[1]))
    ends = torch.zeros(304, dtype=torch.bool)
    for given in (None, prefix):
        sample_lines(model, prompts, np.zeros((4, 3)), ends, prefix=given)
    hook.remove()
    longest = max(map(len, prompts))
    assert read == [longest, 1, 1, longest - len(prefix.tokens), 1, 1]


def test_no_prefix_where_it_would_win_nothing_or_change_something(make_model, prompts):
    llama = float64_model(make_model)
    assert encode_prefix(llama, prompts[:1], LONGEST) is None
    assert encode_prefix(llama, [row[:10] for row in prompts], LONGEST) is None
    narrow = float64_model(make_model, "gemma3_text", sizes={"sliding_window": 64})
    assert encode_prefix(narrow, prompts, 63) is not None
    assert encode_prefix(narrow, prompts, 64) is None
    # its attention counts places in the cache, and no position_ids, so padding would be distance
    assert encode_prefix(float64_model(make_model, "bloom", lora_name=None), prompts, LONGEST) is None


def test_no_prefix_where_rotary_positions_change_behind_it(tmp_path, prompts):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"original_max_position_embeddings": 100, "factor": 2.0}
    model = ULLME(save_llm(tmp_path, "llama", rope_parameters=rope), lora_name=None)
    assert encode_prefix(model, prompts, 100) is not None
    assert encode_prefix(model, prompts, 101) is None
