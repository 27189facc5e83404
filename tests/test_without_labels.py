"""Rows of a query and candidates: read, refused where a label is needed, and learned from with the LLM as teacher."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_directions import DRAWS, PROMPTS
from test_gradcache import assert_same_gradients, gradients, make_batch
from test_objective import with_generation
from tiny import make_tokenizer

from ullme.batch import Batch, Representations
from ullme.data.collator import Collator
from ullme.data.mixture import Mixture, TrainSet
from ullme.data.records import BadRow, Record, parse_record
from ullme.data.sampler import draw
from ullme.data.sources import JsonlSource
from ullme.engine.finite import NotFiniteError
from ullme.engine.gradcache import chunk_slices
from ullme.engine.objective import Objective
from ullme.engine.reference import AdaptersOff
from ullme.losses import DPO, KL, SFT, InfoNCE, Matryoshka, PseudoLabelInfoNCE, info_nce
from ullme.losses.pseudo_labels import best_candidate
from ullme.prompts import PromptTokenizer

ART = ("query_given_passage", 0.05, 0.25)


@pytest.fixture
def batch() -> Batch:
    return replace(with_generation(make_batch()), labelled=False)


@pytest.fixture
def model(make_model):
    return make_model("gpt2").double().train()


def test_rows_of_candidates_are_read():
    row = {"query": " q ", "candidates": ["b", {"title": "T", "text": "a"}, "b "]}
    record = parse_record(row)
    assert record == parse_record(row, "candidates") == Record("q", (), ("b", "T a"))
    assert not record.labelled
    assert record.num_negatives == 1  # beside the first
    assert parse_record({"query": "q", "positive": ["p"], "candidates": ["a"]}).labelled


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        ([], r"'candidates' holds 0 different texts.*at least 2"),
        (["one", "one "], r"'candidates' holds 1 different texts"),
        (["one", " "], r"'candidates\[1\]' is an empty text"),
        (["one", {"title": "T"}], r"missing key 'text' in 'candidates\[1\]'"),
        ("one", r"'candidates' must be a list"),
    ],
)
def test_rows_without_candidates_are_refused(candidates, reason):
    with pytest.raises(BadRow, match=reason):
        parse_record({"query": "q", "candidates": candidates})


def write(path, rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_candidates_are_drawn_as_a_function_of_the_row(tmp_path):
    rows = [{"query": f"q{n}", "candidates": [f"{n}-{k}" for k in range(5 if n else 2)]} for n in range(4)]
    source = JsonlSource(write(tmp_path / "rows.jsonl", rows))
    assert not source.labelled
    assert source.num_negatives.tolist() == [1, 4, 4, 4]
    drawn = [draw(source, 1, epoch, 0, 2) for epoch in range(20)]
    assert drawn == [draw(source, 1, epoch, 0, 2) for epoch in range(20)]
    assert {d.positive for d in drawn} == {f"1-{k}" for k in range(5)}  # the first has no meaning
    for one in drawn:
        assert not one.labelled
        assert len({one.positive, *one.negatives}) == 3
    short = draw(source, 0, 0, 0, 3)
    texts = [short.positive, *short.negatives]
    assert set(texts[:2]) == {"0-0", "0-1"}
    assert len(set(texts)) == 4  # two are borrowed from the candidates of others
    repeated = draw(source, 0, 0, 0, 3, "repeat")
    assert sorted([repeated.positive, *repeated.negatives]) == ["0-0", "0-0", "0-1", "0-1"]


def test_labelled_and_unlabelled_rows_do_not_mix_in_one_file(tmp_path):
    rows = [{"query": "q", "pos": ["p"], "neg": []}, {"query": "q", "candidates": ["a", "b"]}]
    with pytest.raises(ValueError, match=r"rows.jsonl:2: a row without a positive among rows with one.*data\.datasets"):
        JsonlSource(write(tmp_path / "rows.jsonl", rows))


def test_a_mixture_has_labels_only_if_all_of_its_datasets_do(tmp_path):
    rows = {"judged": {"query": "q", "pos": ["p"], "neg": ["n"]}, "unjudged": {"query": "q", "candidates": ["a", "b"]}}
    sources = {name: JsonlSource(write(tmp_path / f"{name}.jsonl", [row])) for name, row in rows.items()}
    for names, labelled in ((("judged",), True), (("judged", "unjudged"), False), (("unjudged", "judged"), False)):
        mixture = Mixture([TrainSet(name) for name in names], [sources[name] for name in names])
        assert mixture.labelled is labelled


def test_a_batch_says_that_it_has_no_labels():
    draws = [(row, drawn._replace(labelled=False)) for row, drawn in DRAWS]
    collator = Collator(PromptTokenizer(make_tokenizer(), PROMPTS), 64, 64, generation=["query_given_passage"])
    assert not collator(draws).labelled
    assert not collator(draws)[0:1].labelled
    assert not collator(draws).to("cpu").labelled
    assert collator(DRAWS).labelled


@pytest.mark.parametrize("term", [InfoNCE(), SFT(), DPO()])
def test_terms_that_need_a_positive_refuse_before_training(term, model):
    kl = KL(*ART, teacher="reference")
    with pytest.raises(ValueError, match=rf"loss term {term.name} needs to know each query's positive.*art\.yaml"):
        Objective([term, kl]).check(model, 3, labelled=False)
    Objective([term, kl]).check(model, 3)
    Objective([kl, PseudoLabelInfoNCE()]).check(model, 3, labelled=False)
    with pytest.raises(ValueError, match=r"kl compares a query's candidates.*num_hard_negatives=0; give at least 1"):
        Objective([kl]).check(model, 0, labelled=False)


def test_pseudo_labels_of_one_candidate_are_refused():
    """Its margin is that of no query, so that the loss would be 0; where known positives are taken one is enough."""
    for term in (PseudoLabelInfoNCE(), Matryoshka(PseudoLabelInfoNCE(use_labels=True), [8])):
        with pytest.raises(ValueError, match=rf"{term.name} compares a query's candidates.*num_hard_negatives=0"):
            Objective([term]).check_rows(0, labelled=False)
    with pytest.raises(ValueError, match="compares a query's candidates"):
        Objective([PseudoLabelInfoNCE()]).check_rows(0)
    Objective([PseudoLabelInfoNCE(use_labels=True)]).check_rows(0)


def test_a_batch_without_labels_has_no_accuracy_of_its_teacher(model, batch):
    terms = [KL(*ART, teacher="reference")]
    labelled = Objective(terms).full_batch(model, replace(batch, labelled=True))
    logs = Objective(terms).full_batch(model, batch)
    assert {"teacher_mrr", "teacher_accuracy"} == set(labelled) - set(logs)
    assert logs["kl"] == labelled["kl"] > 0


def test_the_best_candidate_and_its_margin_by_hand():
    scores = torch.tensor([[-3.0, -1.0, -1.5], [-2.0, -1.0, -1.0], [-1.0, -2.0, -4.0], [-1.0, -1.0, -1.0]])
    keys = torch.tensor([[1, 2, 3], [4, 5, 5], [6, 6, 7], [8, 8, 8]])
    choice, margin = best_candidate(scores, keys)
    assert choice[:3].tolist() == [1, 1, 0]
    # the second row's two best, and the third's, are one text
    assert margin.tolist() == [0.5, 1.0, 3.0, -np.inf]


def reps(teacher: list[list[float]], seed: int = 0) -> Representations:
    generator = torch.Generator().manual_seed(seed)
    b, c = len(teacher), len(teacher[0])

    def unit(*shape: int) -> torch.Tensor:
        draw = torch.randn(*shape, 4, dtype=torch.double, generator=generator)
        return torch.nn.functional.normalize(draw, dim=-1).requires_grad_()

    keys = torch.arange(b * c).view(b, c)
    return Representations(unit(b), unit(b, c), keys, labelled=False, teacher=torch.tensor(teacher, dtype=torch.double))


def test_metrics_of_pseudo_labels_on_ranks_where_different_numbers_pass(monkeypatch):
    """This rank's two queries that pass, one of them right, beside three of the other rank's six: 1/5 and 2/9 here."""
    monkeypatch.setattr("ullme.losses.distillation.world", lambda: (0, 2))
    monkeypatch.setattr("ullme.losses.distillation.gather_sizes", lambda size, _: [size, {3: 6, 2: 3}[size]])
    given = replace(reps([[-3, -1, -2], [-1.0, -1.2, -1.3], [-0.5, -9, -1]]), labelled=True)
    found = PseudoLabelInfoNCE(0.05, margin=0.4).metrics(given)
    # halved by the mean over both ranks, to which the other one adds its part
    assert found == {"pseudo_label_share": pytest.approx(2 * 2 / 9), "pseudo_label_accuracy": pytest.approx(2 * 1 / 5)}


def test_pseudo_labels_by_hand():
    """Queries 0 and 2 pass a margin of 0.4; each against all nine passages."""
    given = reps([[-3, -1, -2], [-1.0, -1.2, -1.3], [-0.5, -9, -1]])
    expected = [
        info_nce(given.queries[[b]], given.passages.flatten(0, 1), torch.tensor([place]), None, 0.05)
        for b, place in ((0, 1), (2, 6))
    ]
    assert expected[0] != expected[1]
    term = PseudoLabelInfoNCE(0.05, margin=0.4)
    torch.testing.assert_close(term(given), torch.stack(expected).mean())
    assert term.metrics(given) == {"pseudo_label_share": pytest.approx(2 / 3)}
    labelled = replace(given, labelled=True)
    assert term.metrics(labelled)["pseudo_label_accuracy"] == pytest.approx(1 / 2)
    torch.testing.assert_close(term(labelled), term(given))
    with_labels = PseudoLabelInfoNCE(0.05, margin=0.4, use_labels=True)
    torch.testing.assert_close(with_labels(labelled), InfoNCE(0.05)(labelled))
    assert (with_labels(labelled) - term(labelled)).abs() > 1e-3
    torch.testing.assert_close(with_labels(given), term(given))  # a batch without labels has none to take
    assert with_labels.metrics(labelled) == term.metrics(labelled)  # of the teacher, not of the labels that are taken


def test_where_no_query_passes_there_is_no_loss_and_no_gradient():
    given = reps([[-1.0, -1.0], [-2.0, -2.1]])
    loss = PseudoLabelInfoNCE(margin=0.5)(given)
    loss.backward()
    assert loss == 0
    assert given.queries.grad is not None
    assert not given.queries.grad.any()


def test_a_margin_of_zero_takes_queries_whose_two_best_are_equal_too():
    given = reps([[-1.0, -1.0, -3.0]])
    term = PseudoLabelInfoNCE(margin=0)
    assert term.metrics(given) == {"pseudo_label_share": 1}
    assert term(given) > 1e-3


def test_a_teachers_score_that_is_nan_stops_the_step(model, batch):
    """It passes no margin, so the loss alone would be finite, without that query."""

    class Broken(AdaptersOff):
        def logps(self, *args):
            return super().logps(*args).masked_fill(batch.row_ids[:, None] == 3, float("nan"))

    objective = Objective([PseudoLabelInfoNCE(margin=0)], Broken())
    with pytest.raises(NotFiniteError, match=r"the teacher of pseudo_label_info_nce is nan \(training rows \[3\]\)"):
        objective.full_batch(model, batch)


def test_a_pseudo_positives_text_is_no_negative_of_its_query():
    given = reps([[-1, -5], [-1, -5], [-1, -5]])
    keys = given.passage_keys.clone()
    keys[2, 1] = keys[0, 0]
    term = PseudoLabelInfoNCE(0.05, margin=0)
    assert term(replace(given, passage_keys=keys)) < term(given) - 1e-4


def test_chunks_change_nothing_and_the_teacher_is_the_pretrained_llm(model, batch):
    """Also against the teacher's scores worked out here."""
    term = PseudoLabelInfoNCE(0.1, margin=0.05)
    objective = Objective([KL(*ART, teacher="reference"), term])
    logs = objective.full_batch(model, batch)
    expected = gradients(model)
    everything = torch.ones_like(batch.passage_keys, dtype=torch.bool)
    teacher = AdaptersOff().logps(model, batch, everything, True, "query_given_passage")
    assert batch.query_generation is not None
    teacher = teacher / batch.query_generation.targets.attention_mask.sum(1)[:, None]
    order = teacher.sort(1, descending=True)
    counts = order.values[:, 0] - order.values[:, 1] >= 0.05
    assert 0 < counts.sum() < len(batch)
    assert logs["pseudo_label_share"] == counts.double().mean()
    with torch.no_grad():
        queries = model(batch.queries.input_ids, batch.queries.attention_mask)["rep"]
        passages = model(batch.passages.input_ids, batch.passages.attention_mask)["rep"]
    places = torch.arange(5) * 3 + order.indices[:, 0]
    loss = info_nce(queries[counts], passages, places[counts], _repeated(batch, places)[counts], 0.1)
    assert logs["pseudo_label_info_nce"].item() == pytest.approx(loss.item(), rel=1e-6)
    for size in (1, 2):
        chunked = objective.grad_cache(model, batch, chunk_slices(batch, size, None))
        assert_same_gradients(gradients(model), expected, 1e-8)
        for name, value in logs.items():
            assert chunked[name].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-9), name


def _repeated(batch: Batch, places: torch.Tensor) -> torch.Tensor:
    """(B, M) True where a passage has the text of a query's pseudo-positive and is not it."""
    keys = batch.passage_keys.flatten()
    same = keys[None] == keys[places][:, None]
    same[torch.arange(len(places)), places] = False
    return same
