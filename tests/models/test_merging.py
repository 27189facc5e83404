"""Merged runs: the weights by hand, PEFT's own methods, and everything that cannot be merged."""

from __future__ import annotations

import json
import math

import pytest
import torch
from export_helpers import PROMPTS, write_run
from peft.tuners.lora import LoraLayer
from tiny import TEXTS

from ullme.models.checkpoint import load_ullme
from ullme.models.merging import check_request, merge_runs, save_merged, slerp_coefficients
from ullme.models.trained_weights import trainable_state
from ullme.prompts import Prompts


def updates(model) -> dict[str, torch.Tensor]:
    """Layer -> s B A, what the adapter adds to the layer's weight."""
    name = model.options.lora_name
    layers = {key: layer for key, layer in model.llm.named_modules() if isinstance(layer, LoraLayer)}
    return {key: layer.get_delta_weight(name).detach() for key, layer in layers.items()}


@pytest.fixture(scope="module")
def make_run(llm_folder, tmp_path_factory):
    """(seed, options) -> a run folder and its model."""
    from ullme.models import ULLME

    def make(seed: int, family: str = "llama", dims=(), **options):
        lora = {"lora_r": 2, "lora_alpha": 6, "lora_target_modules": ["q_proj", "down_proj"]}
        model = ULLME(llm_folder(family), **{**lora, "prompts": PROMPTS, **options})
        generator = torch.Generator().manual_seed(seed)
        for weight in trainable_state(model).values():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
        model.matryoshka_dims = tuple(dims)
        return write_run(model, tmp_path_factory.mktemp("runs") / f"run{seed}"), model

    return make


@pytest.fixture(scope="module")
def pair(make_run):
    (one, first), (other, second) = make_run(1, dims=(16, 8, 4)), make_run(2, lora_name="other", dims=(8, 4, 2))
    return [one, other], [updates(first), updates(second)]


def assert_updates(model, expected: dict[str, torch.Tensor], apart_from: dict[str, torch.Tensor]) -> None:
    found = updates(model)
    assert found.keys() == expected.keys()
    assert len(found) == 4
    for name, value in expected.items():
        assert (value - apart_from[name]).abs().max() > 1e-2, "a comparison of equals proves nothing"
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_the_average_of_adapters_is_exact_and_loads_like_a_run(weights, pair, tmp_path):
    runs, (one, other) = pair
    merged = merge_runs(runs, weights)
    share = 0.5 if weights is None else 0.75
    expected = {name: share * one[name] + (1 - share) * other[name] for name in one}
    assert_updates(merged, expected, one)
    save_merged(merged, tmp_path / "merged", {"method": "average"})
    loaded = load_ullme(tmp_path / "merged")
    assert_updates(loaded, expected, one)
    assert (loaded.options.lora_name, loaded.options.lora_r, loaded.options.lora_alpha) == ("ullme", 4, 4)
    assert loaded.matryoshka_dims == (8, 4)  # those that both runs trained
    assert (loaded.encode(TEXTS) == merged.encode(TEXTS)).all()
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()) == {"method": "average"}
    # once more, now of a merged one, whose rank is another
    with pytest.raises(ValueError, match="lora_r is 4 in the one and 2 in the other"):
        merge_runs([tmp_path / "merged", runs[0]])


def test_slerp_of_adapters(pair):
    runs, (one, other) = pair
    expected = {}
    for name in one:
        a, b = one[name].double(), other[name].double()
        angle = math.acos((a * b).sum() / (a.norm() * b.norm()))
        mixed = math.sin(0.75 * angle) * a + math.sin(0.25 * angle) * b
        expected[name] = (mixed / math.sin(angle)).float()
    linear = {name: 0.75 * one[name] + 0.25 * other[name] for name in one}
    assert_updates(merge_runs(runs, [0.75, 0.25], "slerp"), expected, linear)


def test_methods_of_peft(pair):
    """svd is the best approximation of the average at one run's rank; linear adds up A and B apart."""
    runs, (one, other) = pair
    merged, averages = updates(merge_runs(runs, None, "svd")), {}
    for name in one:
        averages[name] = (one[name] + other[name]) / 2
        u, s, v = torch.linalg.svd(averages[name].double())
        torch.testing.assert_close(merged[name].double(), u[:, :2] * s[:2] @ v[:2], rtol=0, atol=1e-6)
        assert s[2] > 1e-2
    (first, second) = (load_ullme(run) for run in runs)
    linear = merge_runs(runs, None, "linear")
    assert linear.options.lora_r == 2
    for name, layer in linear.llm.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (
                sum(
                    math.sqrt(0.5 * 3) * getattr(m.llm.get_submodule(name), part)[m.options.lora_name].weight
                    for m in (first, second)
                )
                for part in ("lora_A", "lora_B")
            )
            torch.testing.assert_close(layer.get_delta_weight("ullme"), b @ a, rtol=0, atol=1e-6)
            assert (b @ a - averages[name]).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["ties", "ties_svd"])
def test_ties_keeps_what_agrees(method, pair):
    """Of a run with itself, with every value kept, nothing changes."""
    runs, (one, other) = pair
    assert_updates(merge_runs([runs[0], runs[0]], None, method, density=1.0), one, other)


@pytest.mark.parametrize("method", ["average", "slerp"])
def test_whole_weights(method, make_run, tmp_path):
    runs = []
    for seed in (1, 2):
        run, _ = make_run(seed, lora_name=None, pooling="latent_attention", latents=3, latent_heads=2)
        runs.append(run)
    states = [trainable_state(load_ullme(run)) for run in runs]
    save_merged(merge_runs(runs, [1, 3], method), tmp_path / "merged", {})
    found = trainable_state(load_ullme(tmp_path / "merged"))
    assert len(found) > 10
    assert any(name.startswith("pooler.") for name in found)
    differences = []
    for name, value in found.items():
        factors = (0.25, 0.75) if method == "average" else slerp_coefficients(states[0][name], states[1][name], 0.75)
        torch.testing.assert_close(value, factors[0] * states[0][name] + factors[1] * states[1][name])
        differences.append((states[0][name] - value).abs().max().item())
    assert min(differences) > 1e-2
    with pytest.raises(ValueError, match=r"method=svd: .* trained all weights, and this method is one of adapters"):
        merge_runs(runs, None, "svd")


def test_slerp_coefficients_by_hand():
    """At a right angle halfway: 1/√2 each; the same direction and zeros: linear."""
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert slerp_coefficients(x, y, 0.5) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    assert slerp_coefficients(x, y, 0.0) == pytest.approx((1, 0))
    assert slerp_coefficients(x, y, 1 / 3) == pytest.approx((math.sqrt(3) / 2, 0.5))
    assert slerp_coefficients(x, 3 * x, 0.25) == slerp_coefficients(0 * x, y, 0.25) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "causal"}, "attention is 'bidirectional' in the one and 'causal' in the other"),
        ({"pooling": "last"}, "pooling is 'mean' in the one and 'last' in the other"),
        ({"prompts": Prompts(query="{text}", passage="{text}")}, "prompts.query is 'find: {text}' in the one"),
        ({"family": "mistral"}, "the LLM's model_type is 'llama' in the one and 'mistral' in the other"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules is .*'down_proj', 'q_proj'.* in the one"),
        ({"lora_name": None}, "train is 'lora' in the one and 'all' in the other"),
    ],
)
def test_runs_that_do_not_fit_together(options, message, make_run, pair):
    run, _ = make_run(3, **options)
    with pytest.raises(ValueError, match=message):
        merge_runs([pair[0][0], run])


def test_another_llm_of_the_same_shape(make_run, pair):
    run, _ = make_run(3)
    stored = torch.load(run / "checkpoints" / "last.ckpt")
    stored["ullme"]["fingerprint"] = "another"
    stored["ullme"]["llm"]["config"]["of_another_version"] = 1
    torch.save(stored, run / "checkpoints" / "last.ckpt")
    merge_runs([pair[0][0], run])  # the same weights, read by another version of transformers
    stored["ullme"]["llm"]["weights"] = "others"
    torch.save(stored, run / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match="the hash of the LLM's weights in auto is"):
        merge_runs([pair[0][0], run])
    del stored["ullme"]["llm"]  # as in a checkpoint of an earlier version
    torch.save(stored, run / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match="the fingerprint of the LLM's weights in auto is"):
        merge_runs([pair[0][0], run])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"],), "runs: 1 given; name two or more"),
        ((["a", "b"], [1.0]), r"weights=\[1.0\]: give one for each of the 2 runs"),
        ((["a", "b"], [1.0, -1.0]), "give numbers of 0 or more"),
        ((["a", "b"], [0.0, 0.0]), "one at least is above 0"),
        ((["a", "b", "c"], None, "slerp"), "method=slerp interpolates between two runs, and 3 are given"),
        ((["a", "b"], None, "mean"), "method='mean': choose one of average, slerp"),
        ((["a", "b"], None, "ties", 0.0), "density=0.0: give a share above 0"),
    ],
)
def test_requests_that_make_no_sense(arguments, message):
    runs, weights, method, density = (*arguments, *(None, "average", 0.5)[len(arguments) - 1 :])
    with pytest.raises(ValueError, match=message):
        check_request(runs, weights, method, density)
