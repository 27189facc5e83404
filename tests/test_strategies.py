"""Training over ranks through Lightning: every strategy gives what one process gives on the same global batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from ranks import on_ranks
from strategy_runs import CASES, INTERRUPTED, RESUMED, STEPS, checkpoint, train, validate, work, write_data
from tiny import save_llm


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random GPT-2 (its norms do not round to float32, as Llama's do), training rows and a BEIR folder."""
    folder = tmp_path_factory.mktemp("strategies")
    save_llm(folder / "llm", "gpt2", n_embd=32, n_layer=2, n_head=4)
    write_data(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(folder) -> Callable[..., dict[str, Any]]:
    """What one process gives."""
    return cache(lambda *case: train(folder, case, 1))


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["2 ranks", "4 ranks"])
def together(request, folder, tmp_path_factory) -> tuple[int, list[dict[Any, Any]]]:
    """What every rank gives, all cases in one process group."""
    return request.param, on_ranks(request.param, tmp_path_factory.mktemp("ranks"), work, folder, request.param)


@pytest.mark.distributed
def test_ranks_train_as_one_process(together, alone):
    """Losses of all steps, gradients of the first, weights after the last; the last batch is uneven."""
    ranks, results = together
    for case in CASES[ranks]:
        strategy, objective, lora = case
        single = strategy == "fsdp1" and not lora
        expected = alone("fsdp1" if single else "-", objective, lora)
        # Adam divides by the gradient's size, so float32's noise in a small gradient moves a weight by a step
        exact, near = (1e-5, 2e-4) if single else (1e-9, 1e-9)
        assert len(expected["losses"]) == STEPS
        assert max(gradient.abs().max() for gradient in expected["gradients"].values()) > 1e-3
        for rank in results:
            found = rank[case]
            assert found["losses"] == pytest.approx(expected["losses"], abs=exact), case
            assert found["norm"] == pytest.approx(expected["norm"], rel=10 * exact), case
            assert found["gradients"].keys() == expected["gradients"].keys(), case
            for name, gradient in expected["gradients"].items():
                torch.testing.assert_close(found["gradients"][name], gradient, rtol=0, atol=exact, msg=f"{case} {name}")
        state = results[0][case]["state"]
        # of an adapter, FSDP gathers nothing else
        saved = (
            {f"model.{name}" for name in expected["gradients"]} if lora and "fsdp" in strategy else expected["state"]
        )
        assert set(state) == set(saved), case
        for name, weight in state.items():
            torch.testing.assert_close(weight, expected["state"][name], rtol=0, atol=near, msg=f"{case} {name}")


@pytest.mark.distributed
def test_saving_an_adapter_gathers_no_weights(together, alone):
    """A checkpoint of all weights gathers at least these; of an adapter, only its path is sent."""
    ranks, results = together
    size = sum(weight.numel() for weight in alone("-", "cl", False)["state"].values())
    for case in CASES[ranks]:
        strategy, _, lora = case
        if strategy == "fsdp1" and not lora:
            continue  # see strategy_runs
        for rank in results:
            sent = rank[case]["communicated"]
            assert sent < 0.05 * size if lora or strategy == "ddp" else sent > 0.5 * size, case


@pytest.mark.distributed
def test_ranks_do_equally_many_forwards(together):
    """Chunks are cut by tokens, so ranks have different numbers of them; those with fewer go along."""
    ranks, results = together
    for case in CASES[ranks]:
        assert len({rank[case]["forwards"] for rank in results}) == 1
        assert max(rank[case]["idle"] for rank in results) > 0


@pytest.mark.distributed
def test_no_host_waits_for_others_in_a_step(together):
    """A barrier makes it wait for its GPU too; Lightning's ``sync_dist`` has one for each value that is logged."""
    ranks, results = together
    assert {rank[case]["barriers"] for rank in results for case in CASES[ranks]} == {0}


@pytest.mark.distributed
def test_validation_over_ranks_is_exact(together, folder):
    _, results = together
    scores, ranking = validate(folder, "-", 1)
    assert 0 < scores["val/mrr@10"] < 1
    assert sorted(ranking[0, :12].tolist()) == [*range(12)]
    for rank in results:
        for strategy in ("ddp", "fsdp2"):
            found, ranks_ranking = rank["val", strategy]
            assert found == scores
            assert torch.equal(ranks_ranking, ranking)


@pytest.mark.distributed
def test_a_checkpoint_goes_on_under_every_other_strategy(together, alone, folder):
    """Weights and optimizer states: the rest of the run is that of the run that was not interrupted."""
    ranks, results = together
    if ranks != 2:
        pytest.skip("once is enough")
    found = {case: results[0]["resumed", case] for case in RESUMED}
    for case in [("fsdp2", "grl", True), ("fsdp2", "cl", False)]:
        found["-", *case[1:]] = train(folder, ("-", *case[1:]), 1, checkpoint(folder, case, 2))
    for (strategy, *kind), run in found.items():
        expected = alone("-", *kind)
        assert run["losses"] == pytest.approx(expected["losses"][INTERRUPTED:], abs=1e-9), (strategy, kind)
        for name, weight in run["state"].items():
            torch.testing.assert_close(weight, expected["state"][name], rtol=0, atol=1e-9, msg=f"{strategy} {name}")
