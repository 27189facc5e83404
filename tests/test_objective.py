"""Every objective: chunks, order and sharing of prompts change no gradient; what its terms compute and refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_gradcache import assert_same_gradients, gradients, make_batch, with_extra_positives

from ullme.batch import Batch, GenerationRows
from ullme.engine.finite import NotFiniteError
from ullme.engine.gradcache import chunk_slices
from ullme.engine.objective import Objective
from ullme.losses import CPO, DPO, IPO, KL, KTO, SFT, Hinge, InfoNCE, Matryoshka, PseudoLabelInfoNCE, SimPO, Term
from ullme.prompts import pad_rows
from ullme.token_rows import TokenRows

QUERY: Any = "query_given_passage"
OBJECTIVES: dict[str, Callable[[], list[Term]]] = {
    "grl": lambda: [InfoNCE(), DPO(weight=0.5), KL()],
    "grl_sft": lambda: [InfoNCE(), SFT(0.5), KL()],
    "cl_sft": lambda: [InfoNCE(), SFT()],
    "sft": lambda: [SFT()],
    "dpo": lambda: [DPO()],
    "dpo_first_detached_kl": lambda: [InfoNCE(), DPO(negatives="first"), KL(detach_generation=True)],
    "dpo_random": lambda: [DPO(negatives="random")],
    "kto": lambda: [InfoNCE(), KTO(weight=2.0), KL()],
    "kto_first_negative": lambda: [KTO(reference_pairs="first_negative")],
    "cpo": lambda: [CPO(), KL("passage_given_query", 0.1, 2.0, divergence="generation_to_retrieval")],
    "others": lambda: [IPO(0.01), Hinge(), SimPO()],
    "kl": lambda: [KL()],
    "query_grl": lambda: [InfoNCE(), DPO(direction=QUERY), KL(QUERY)],
    "query_sft_kto": lambda: [SFT(direction=QUERY), KTO(direction=QUERY), KL(QUERY, detach_generation=True)],
    "query_others": lambda: [IPO(0.01, direction=QUERY), Hinge(direction=QUERY), SimPO(direction=QUERY)],
    "both_directions": lambda: [DPO(negatives="first"), CPO(direction=QUERY), KL("gain")],
    "query_teacher": lambda: [InfoNCE(), KL(QUERY, 0.1, 0.5, teacher="reference")],
    "gain_teacher": lambda: [KL("gain", teacher="reference", divergence="generation_to_retrieval"), SFT()],
    "matryoshka": lambda: [Matryoshka(InfoNCE(bidirectional=True), [16, 5], [0.5, 2.0], weight=1.5), SFT()],
    "all_positives": lambda: [Matryoshka(InfoNCE(positives="all", bidirectional=True), [8]), DPO(), KL()],
    "pseudo_labels": lambda: [PseudoLabelInfoNCE(margin=0.05), KL(QUERY, teacher="reference")],
}


def with_generation(batch: Batch) -> Batch:
    generator = torch.Generator().manual_seed(9)

    def rows(n: int, low: int, high: int) -> TokenRows:
        lengths = torch.randint(low, high, (n,), generator=generator).tolist()
        return pad_rows([torch.randint(3, 300, (k,), generator=generator).tolist() for k in lengths], 0)

    b, bc = len(batch), batch.passage_keys.numel()
    given_query = GenerationRows(rows(b, 3, 6), rows(bc, 1, 9))
    return replace(
        batch,
        generation=given_query,
        query_generation=GenerationRows(rows(bc, 3, 9), rows(b, 1, 6)),
        passage_generation=GenerationRows(rows(b, 2, 3), given_query.targets),
    )


class SFT2(SFT):
    """A second SFT in one objective needs a name of its own."""

    name = "sft2"


@pytest.fixture
def batch() -> Batch:
    return with_generation(make_batch())


@pytest.fixture
def model(make_model):
    return make_model().double().train()


def by(objective: Objective, model, batch: Batch, slices=None) -> tuple[dict, dict]:
    run = objective.full_batch(model, batch) if slices is None else objective.grad_cache(model, batch, slices)
    return {k: v.item() for k, v in run.items()}, gradients(model)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_chunks_change_no_gradient(name, model, batch):
    if name == "all_positives":
        batch = with_extra_positives(batch)
    objective = Objective(OBJECTIVES[name]())
    logs, expected = by(objective, model, batch)
    for slices in (chunk_slices(batch, 1, None), chunk_slices(batch, 2, None), chunk_slices(batch, 99, None)):
        chunked, found = by(objective, model, batch, slices)
        assert chunked == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in logs.items()}
        assert_same_gradients(found, expected, 1e-6)  # Llama's norms round to float32


@pytest.mark.parametrize("name", ["grl", "kto", "dpo_random", "query_sft_kto", "both_directions", "gain_teacher"])
def test_chunks_change_no_gradient_in_true_float64(name, make_model, batch):
    model = make_model("gpt2").double().train()
    objective = Objective(OBJECTIVES[name]())
    _, expected = by(objective, model, batch)
    for held in (0, 2):
        objective.grad_cache(model, batch, chunk_slices(batch, 2, None), num_retained=held)
        assert_same_gradients(gradients(model), expected, 1e-10)


@pytest.mark.parametrize("name", ["grl", "kto_first_negative", "dpo_random", "both_directions", "query_teacher"])
def test_order_of_queries_changes_nothing(name, model, batch):
    objective = Objective(OBJECTIVES[name]())
    parts = [batch[n : n + 1] for n in (3, 0, 4, 2, 1)]
    fields = {
        field: GenerationRows(
            *(TokenRows.cat([getattr(getattr(p, field), side) for p in parts]) for side in ("prompts", "targets"))
        )
        for field in ("generation", "query_generation", "passage_generation")
    }
    shuffled = Batch(
        TokenRows.cat([p.queries for p in parts]),
        TokenRows.cat([p.passages for p in parts]),
        torch.cat([p.passage_keys for p in parts]),
        torch.cat([p.row_ids for p in parts]),
        **fields,
    )
    logs, expected = by(objective, model, batch, chunk_slices(batch, 2, None))
    other, found = by(objective, model, shuffled, chunk_slices(shuffled, 2, None))
    assert other == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in logs.items()}
    assert_same_gradients(found, expected, 1e-6)


@pytest.mark.parametrize("name", ["grl", "dpo_first_detached_kl", "kto", "both_directions"])
def test_shared_prompts_change_nothing(name, model, batch):
    _, shared = by(Objective(OBJECTIVES[name](), share_prompts=True), model, batch, chunk_slices(batch, 2, None))
    _, apart = by(Objective(OBJECTIVES[name](), share_prompts=False), model, batch, chunk_slices(batch, 2, None))
    assert_same_gradients(shared, apart, 1e-6)


def test_the_total_is_the_weighted_sum_and_each_term_moves_it(model, batch):
    logs, whole = by(Objective([InfoNCE(), DPO(weight=0.5), KL(weight=2.0)]), model, batch)
    assert logs["loss"] == pytest.approx(logs["info_nce"] + 0.5 * logs["dpo"] + 2 * logs["kl"], rel=1e-6)
    assert {"reward_margin", "reward_accuracy", "rank_agreement"} <= logs.keys()
    parts = [by(Objective([t]), model, batch)[1] for t in (InfoNCE(), DPO(), KL())]
    for name, gradient in whole.items():
        zero = torch.zeros_like(gradient)
        each = [part.get(name, zero) for part in parts]
        torch.testing.assert_close(gradient, each[0] + 0.5 * each[1] + 2 * each[2], rtol=1e-5, atol=1e-7)
        assert all(part.abs().max() > 0 for part in each)


def test_dpo_starts_at_ln_2_and_the_reference_is_the_pretrained_llm(make_model, batch):
    model = make_model("gpt2", sizes={"resid_pdrop": 0.1, "embd_pdrop": 0.1}, lora_dropout=0.3).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    logs, _ = by(Objective([DPO()]), model, batch)
    assert logs["dpo"] == pytest.approx(math.log(2), abs=1e-6)
    moved, _ = by(Objective([DPO()]), make_model(), batch)
    assert abs(moved["dpo"] - math.log(2)) > 1e-3


class Watching(KTO):
    """Keeps what it sees."""

    def forward(self, chunk):
        self.seen = chunk
        return super().forward(chunk)


def log_ratio_of_one_pair(model, prompt: list[int], target: list[int]) -> float:
    """log π/π_ref of a target after a prompt, with transformers' logits."""

    def logp() -> float:
        logits = model.causal_lm(input_ids=torch.tensor([prompt + target]), is_causal=True).logits[0].log_softmax(-1)
        return sum(logits[len(prompt) - 1 + n, token].item() for n, token in enumerate(target))

    with torch.no_grad():
        policy = logp()
        with model.adapters_off():
            return policy - logp()


def ids_of(rows: TokenRows, row: int) -> list[int]:
    return rows.input_ids[row][rows.attention_mask[row].bool()].tolist()


@pytest.mark.parametrize("negatives", ["all", "random"])
@pytest.mark.parametrize("direction", ["passage_given_query", QUERY])
@pytest.mark.parametrize("pairs", ["mismatched", "first_negative"])
def test_ktos_reference_point_is_the_mean_log_ratio_of_its_pairs(
    pairs, direction, negatives, make_model, batch, monkeypatch
):
    """Also where it learns from other candidates, and in several passes. Query n goes with candidate 0 of query n + 1,
    or with candidate 1 of its own."""
    model = make_model("gpt2").double().eval()
    others = [((n + 1) % 5) * 3 if pairs == "mismatched" else n * 3 + 1 for n in range(5)]
    if direction == QUERY:
        rows = batch.query_generation
        texts = [(ids_of(rows.prompts, other), ids_of(rows.targets, n)) for n, other in enumerate(others)]
    else:
        rows = batch.generation
        texts = [(ids_of(rows.prompts, n), ids_of(rows.targets, other)) for n, other in enumerate(others)]
    expected = sum(log_ratio_of_one_pair(model, *pair) for pair in texts) / 5
    assert abs(expected) > 1e-2
    for at_once in (99, 2):
        monkeypatch.setattr("ullme.engine.objective.STATISTIC_QUERIES", at_once)
        term = Watching(negatives=negatives, direction=direction, reference_pairs=pairs)
        logs = Objective([term]).full_batch(model, batch)
        assert term.seen.statistics["kto"].item() == pytest.approx(expected, rel=1e-6)
        assert logs["reference_point"].item() == pytest.approx(expected, rel=1e-6)


def test_a_batch_of_one_query_has_no_mismatched_pair(model, batch):
    assert Objective([KTO()]).full_batch(model, batch[:1])["reference_point"] == 0
    assert Objective([KTO(reference_pairs="first_negative")]).full_batch(model, batch[:1])["reference_point"] != 0


def test_one_generation_forward_serves_all_terms(model, batch):
    """Policy once with gradient, reference once without: two forwards, whatever the terms."""
    calls = []
    forward = model.forward

    def counted(*args, **kwargs):
        calls.append((kwargs.get("is_generate", False), torch.is_grad_enabled()))
        return forward(*args, **kwargs)

    model.forward = counted
    Objective([SFT(), DPO(), CPO(), KL()]).full_batch(model, batch)
    assert sorted(calls) == [(False, True), (True, False), (True, True)]


def test_each_likelihood_is_computed_once_for_all_terms(model, batch):
    """SFT learns from five positives, DPO and KL from all 15: one forward with gradient for each direction."""
    calls = []
    forward = model.forward

    def counted(*args, **kwargs):
        if kwargs.get("is_generate"):
            calls.append((len(args[0]), len(kwargs["targets"]), torch.is_grad_enabled()))
        return forward(*args, **kwargs)

    model.forward = counted
    Objective([SFT(), SFT2(direction=QUERY), DPO(direction=QUERY), KL("gain")]).full_batch(model, batch)
    queries, passages = 5, 15
    # (prompts, targets, gradient): log pi_ref(q|p); then log pi(q|p), log pi(p|q) and log pi(p)
    assert sorted(calls) == sorted(
        [(passages, passages, False), (passages, passages, True), (queries, passages, True), (queries, passages, True)]
    )


def test_a_reference_teacher_runs_no_policy(model, batch):
    """And one whose likelihoods are known runs nothing but the embedding."""
    calls = []
    forward = model.forward

    def counted(*args, **kwargs):
        calls.append((kwargs.get("is_generate", False), torch.is_grad_enabled()))
        return forward(*args, **kwargs)

    model.forward = counted
    objective = Objective([InfoNCE(), KL(QUERY, teacher="reference")])
    objective.full_batch(model, batch)
    assert [call[:2] for call in calls] == [(True, False), (False, True)]
    assert objective.policy_likelihoods == ()
    assert objective.likelihoods == objective.reference_likelihoods == (QUERY,)


def test_only_candidates_that_teach_go_through_backward(model, batch):
    sizes = []
    forward = model.forward

    def counted(*args, **kwargs):
        if kwargs.get("is_generate"):
            sizes.append((len(kwargs["targets"]), torch.is_grad_enabled()))
        return forward(*args, **kwargs)

    model.forward = counted
    Objective([SFT(), KL(detach_generation=True)]).full_batch(model, batch)
    assert sorted(sizes) == [(5, True), (10, False)]


def test_terms_without_embedding_do_not_embed(model, batch):
    kinds = []
    forward = model.forward
    model.forward = lambda *a, **k: kinds.append(k.get("is_generate", False)) or forward(*a, **k)
    Objective([DPO()]).grad_cache(model, batch, chunk_slices(batch, 2, None))
    assert all(kinds)


def test_a_nan_in_the_representations_names_their_rows(model, batch):
    """Not all the rows of the batch, although InfoNCE is one number."""
    embed, wrong = model.forward, batch.queries.input_ids[3, 0].item()

    def poisoned(input_ids, *args, **kwargs):
        found = embed(input_ids, *args, **kwargs)
        return {"rep": torch.where(input_ids[:, :1] == wrong, float("nan"), found["rep"])}

    model.forward = poisoned
    assert (batch.queries.input_ids[:, 0] == wrong).sum() == 1
    with pytest.raises(NotFiniteError, match=r"info_nce is nan \(training rows \[.*3.*\]\)") as error:
        Objective([InfoNCE()]).grad_cache(model, batch, chunk_slices(batch, 2, None))
    firsts = batch.passages.input_ids[:, 0].view(len(batch), -1)
    guilty = ((firsts == wrong).any(1) | (batch.queries.input_ids[:, 0] == wrong)).nonzero()[:, 0].tolist()
    assert len(guilty) < len(batch)
    assert f"training rows {guilty})" in str(error.value)


def test_preferences_need_negatives(model):
    with pytest.raises(ValueError, match=r"dpo compares a positive with negatives.*data.num_hard_negatives=0"):
        Objective([DPO()]).check(model, 0)
    Objective([SFT()]).check(model, 0)


def test_a_term_that_is_not_finite_names_itself_and_its_rows(model, batch, monkeypatch):
    plain = DPO.forward
    monkeypatch.setattr(DPO, "forward", lambda self, chunk: plain(self, chunk) / (chunk.row_ids != 3))
    with pytest.raises(ValueError, match=r"dpo is inf \(training rows \[3\]\)"):
        Objective([InfoNCE(), DPO()]).grad_cache(model, batch, chunk_slices(batch, 2, None))


def test_batches_without_generation_rows_are_refused(model):
    with pytest.raises(ValueError, match="carry no generation rows"):
        Objective([SFT()]).full_batch(model, make_batch())


def test_metrics_of_two_terms_are_kept_apart(model, batch):
    logs, _ = by(Objective([DPO(), CPO()]), model, batch)
    alone, _ = by(Objective([DPO()]), model, batch)
    assert logs["reward_margin"] == pytest.approx(alone["reward_margin"])
    assert 0 <= logs["reward_accuracy"] <= 1
    assert logs["cpo/reward_margin"] != pytest.approx(logs["reward_margin"], abs=1e-3)


def test_each_term_looks_at_the_positives_that_it_says(model, batch):
    """Terms of one positive, and an InfoNCE of one, have the values that they have without extra positives."""
    several = with_extra_positives(batch)
    of_one = [InfoNCE(), DPO(), KL(), SFT()]
    expected, gradient = by(Objective(of_one), model, batch)
    found, same = by(Objective(of_one), model, several)
    assert found == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(same, gradient, 1e-6)
    of_all, other = by(Objective([InfoNCE(positives="all"), *of_one[1:]]), model, several)
    assert of_all["dpo"] == pytest.approx(expected["dpo"], rel=1e-6)
    assert of_all["kl"] == pytest.approx(expected["kl"], rel=1e-6)
    assert abs(of_all["info_nce"] - expected["info_nce"]) > 1e-3
    assert of_all["positives_per_row"] == pytest.approx((3 + 1 + 3 + 2 + 3) / 5)
    assert max((other[name] - gradient[name]).abs().max() for name in other) > 1e-4
