"""Each dataset of a mixture has its own terms: what a step computes, and what is refused before training."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_gradcache import assert_same_gradients, gradients, make_batch
from test_objective import with_generation
from tiny import make_tokenizer

from ullme.data.datamodule import ULLMEDataModule
from ullme.data.mixture import TrainSet
from ullme.engine.gradcache import chunk_slices
from ullme.engine.objective import Objective
from ullme.engine.reference import make_reference
from ullme.losses import DPO, KL, SFT, CoSENT, DistillationKL, InfoNCE, MarginMSE, Matryoshka, PseudoLabelInfoNCE
from ullme.losses.false_negatives import FalseNegatives
from ullme.prompts import Prompts, PromptTokenizer
from ullme.training.rows import check_columns, check_positives, check_rows, datasets_for_teacher

PASSAGES = {"query": "q", "pos": ["p"], "neg": ["n", "m"]}
PAIRS = {"sentence1": "a", "sentence2": "b", "score": 0.5}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def write(tmp_path, name: str, row: dict) -> str:
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(row) for _ in range(4)))
    return str(path)


def mixture(tmp_path, *sets: tuple[dict, list[str] | None]) -> ULLMEDataModule:
    files = [
        TrainSet(write(tmp_path, f"set{n}", row), terms=terms, num_hard_negatives=2 if "pos" in row else 0)
        for n, (row, terms) in enumerate(sets)
    ]
    data = ULLMEDataModule(datasets=files, batch_size=2)
    data.setup("fit")
    return data


def test_every_dataset_with_terms_that_it_can_serve_is_fine(tmp_path, caplog):
    data = mixture(tmp_path, (PASSAGES, ["info_nce", "dpo"]), (PAIRS, ["cosent"]), (CHAT, ["sft"]))
    check_rows(Objective([InfoNCE(), DPO(), CoSENT(), SFT()]), data)
    assert not caplog.records
    check_rows(Objective([InfoNCE(), DPO(), CoSENT(), SFT(), DistillationKL()]), data)
    assert "no dataset names the loss term distillation_kl" in caplog.text


@pytest.mark.parametrize(
    ("row", "terms", "message"),
    [
        (PASSAGES, ["cosent"], r"loss term cosent reads the column 'score', in which no row of '.*set0.jsonl' has"),
        (PAIRS, ["info_nce"], r"info_nce needs to know each query's positive.*of '.*set0.jsonl' have none"),
        (PAIRS, None, r"info_nce and dpo and sft needs to know each query's positive"),
        (CHAT, ["dpo"], r"dpo compares a positive with negatives.*=0 of '.*set0.jsonl'; give at least 1"),
        (PASSAGES, ["infonce"], r"terms=\['infonce'\]: loss.terms has no term 'infonce'; it has info_nce, dpo, cosent"),
    ],
)
def test_a_term_that_a_dataset_cannot_serve_is_refused_by_name(row, terms, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_rows(Objective([InfoNCE(), DPO(), CoSENT(), SFT()]), mixture(tmp_path, (row, terms)))


def test_terms_that_all_have_weight_0_are_refused(tmp_path):
    """Their steps would do nothing; a term of weight 0 beside another one is only logged."""
    terms = [InfoNCE(), SFT(weight=0.0)]
    check_rows(Objective(terms), mixture(tmp_path, (PASSAGES, None)))
    with pytest.raises(ValueError, match=r"with sft of weight 0 a step of '.*set1\.jsonl' trains nothing"):
        check_rows(Objective(terms), mixture(tmp_path, (PASSAGES, None), (CHAT, ["sft"])))
    with pytest.raises(ValueError, match=r"with info_nce and sft of weight 0 a step trains nothing"):
        Objective([InfoNCE(weight=0.0), SFT(weight=0.0)]).check_rows(2)


def test_a_cache_that_no_term_needs_is_named(tmp_path, caplog):
    """As with the paper's KL, whose teacher is the policy."""
    data, cache = mixture(tmp_path, (PASSAGES, None)), make_reference("adapters_off", str(tmp_path / "cache"))
    for term in (KL(teacher="reference"), DPO()):
        check_rows(Objective([InfoNCE(), term], cache), data)
    assert not caplog.records
    check_rows(Objective([InfoNCE(), KL()], cache), data)
    assert "cache is neither read nor filled" in caplog.text
    assert "which no term of the loss needs (info_nce, kl)" in caplog.text


def test_a_teacher_is_measured_on_rows_with_labels_and_negatives(tmp_path):
    """On those that it teaches, or where these have no labels, on others; batches without use are never tokenised."""
    tokenizer = PromptTokenizer(make_tokenizer(), Prompts(query="{text}"))
    unjudged, paired = {"query": "q", "candidates": ["a", "b", "c"]}, {"query": "q", "pos": ["p"]}
    for sets, expected in (
        ([(PASSAGES, ["info_nce"]), (unjudged, ["kl"])], [0]),
        ([(PASSAGES, ["info_nce"]), (unjudged, ["kl"]), (PASSAGES, None)], [2]),
        ([(unjudged, ["kl"]), (PASSAGES, ["info_nce", "kl"])], [1]),
        ([(unjudged, ["kl"])], []),
    ):
        data = mixture(tmp_path, *sets)
        assert datasets_for_teacher(data, "kl") == expected
        batches = data.first_batches(tokenizer, datasets=expected)
        counts = [len(data.source[batch.row_ids[0]].negatives) for batch in batches]
        assert set(counts) == ({2} if expected else set())
    for row, negatives, expected in ((PASSAGES, 2, [0]), (paired, 0, []), (unjudged, 2, [])):
        data = ULLMEDataModule(train=write(tmp_path, "rows", row), num_hard_negatives=negatives, batch_size=2)
        data.setup("fit")
        assert datasets_for_teacher(data, "kl") == expected
        assert len(list(data.first_batches(tokenizer, datasets=expected))) == 2 * len(expected)


def test_scores_need_candidates_and_unused_ones_are_named(tmp_path, caplog):
    scored = {**PASSAGES, "pos_scores": [1], "neg_scores": [0, 0.5]}
    data = ULLMEDataModule(train=write(tmp_path, "rows", scored), num_hard_negatives=0, batch_size=2)
    data.setup("fit")
    for term in (DistillationKL(), InfoNCE(false_negatives=FalseNegatives(0.1, scores="column"))):
        with pytest.raises(
            ValueError, match=rf"loss term {term.name} compares .*num_hard_negatives=0; give at least 1"
        ):
            check_rows(Objective([term]), data)
    check_rows(Objective([InfoNCE()]), data)  # in-batch terms alone: right, but the scores are not used
    assert "have the column score, and no loss term reads it" in caplog.text


@pytest.mark.parametrize("nested", [False, True])
def test_scores_that_do_not_suit_the_temperature_are_a_warning(tmp_path, caplog, nested):
    data = mixture(tmp_path, ({**PASSAGES, "pos_scores": [24], "neg_scores": [11, 8.5]}, None))
    for temperature in (0.05, 8.0):
        term = DistillationKL(teacher_temperature=temperature)
        check_rows(Objective([Matryoshka(term, [8]) if nested else term]), data)
    (warning,) = [record.message for record in caplog.records]
    assert "set0.jsonl': DistillationKL.teacher_temperature=0.05: for 4 of 4 rows" in warning


def test_a_column_without_numbers_is_refused():
    with pytest.raises(ValueError, match=r"distillation_kl reads the column 'teacher'.*\(they have 'score'\)"):
        check_columns([DistillationKL("teacher")], {"score": "candidate"}, 2)
    with pytest.raises(ValueError, match=r"they have no column of numbers"):
        check_columns([DistillationKL()], {}, 2)


@pytest.mark.parametrize(
    ("term", "kind", "negatives", "message"),
    [
        (DistillationKL(), "query", 1, r"DistillationKL\.column='score' has one number a query.*give a list of scores"),
        (MarginMSE(), "query", 2, r"MarginMSE\.column='score' has one number a query.*there are 2.*set that to 1"),
        (CoSENT(), "candidate", 1, r"CoSENT\.column='score' has one number a candidate.*take DistillationKL"),
        (Matryoshka(CoSENT(), [8]), "candidate", 1, r"CoSENT\.column='score' has one number a candidate"),
        (
            InfoNCE(false_negatives=FalseNegatives(0.1, scores="column")),
            "query",
            1,
            r"InfoNCE\.false_negatives\.column='score' has one number a query; it needs one a candidate",
        ),
    ],
)
def test_a_column_of_the_wrong_kind_is_refused_before_the_model_is_loaded(tmp_path, term, kind, negatives, message):
    """sentence-transformers' label of a triplet is one number; its and BGE's scores of a list are one a candidate."""
    scores = {"label": 1.0} if kind == "query" else {"pos_scores": [1.0], "neg_scores": [0.2, 0.1]}
    row = {**PASSAGES, **scores}
    data = ULLMEDataModule(train=write(tmp_path, "rows", row), num_hard_negatives=negatives, batch_size=2)
    data.setup("fit")
    with pytest.raises(ValueError, match=message):
        check_rows(Objective([term]), data)
    sets = [TrainSet(write(tmp_path, "set", row), num_hard_negatives=negatives)]
    data = ULLMEDataModule(datasets=sets, batch_size=2)
    data.setup("fit")
    with pytest.raises(ValueError, match=rf"the rows of '.*set\.jsonl': {message}"):
        check_rows(Objective([term]), data)


def test_columns_of_either_kind_that_a_term_can_use():
    check_columns([MarginMSE()], {"score": "query"}, 1)
    check_columns([MarginMSE(), DistillationKL()], {"score": "candidate"}, 3)
    check_columns([CoSENT()], {"score": "candidate"}, 0)


def test_a_step_computes_the_terms_of_its_dataset_alone(make_model):
    model = make_model("gpt2").double().train()
    scores = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7])
    whole = replace(with_generation(make_batch()), columns={"score": scores})
    objective = Objective([InfoNCE(), SFT(2.0), CoSENT()])
    for names, terms in (
        (("info_nce",), [InfoNCE()]),
        (("sft",), [SFT(2.0)]),
        (("cosent", "sft"), [SFT(2.0), CoSENT()]),
    ):
        batch = replace(whole, terms=names)
        expected_logs = Objective(terms).full_batch(model, whole)
        expected = gradients(model)
        for run in (
            lambda b: objective.full_batch(model, b),
            lambda b: objective.grad_cache(model, b, chunk_slices(b, 2, None)),
        ):
            logs = run(batch)
            assert logs.keys() == expected_logs.keys()
            assert logs["loss"].item() == pytest.approx(expected_logs["loss"].item(), abs=1e-10)
            assert_same_gradients(gradients(model), expected, 1e-9)
    assert batch[1:3].terms == batch.to("cpu").terms == ("cosent", "sft")
    every = objective.full_batch(model, whole)
    assert {"info_nce", "sft", "cosent"} <= every.keys()
    assert objective.of_terms(["sft", "cosent", "info_nce"]) is objective


def test_a_guide_needs_adapters(make_model):
    objective = Objective([InfoNCE(false_negatives=FalseNegatives(0.0, scores="guide"))])
    objective.check(make_model("gpt2"), 2)
    with pytest.raises(ValueError, match=r"scores=guide, but lora_name=null.*scores=student"):
        objective.check(make_model("gpt2", lora_name=None), 2)


@pytest.mark.parametrize(
    "terms",
    [
        [InfoNCE()],
        [Matryoshka(InfoNCE(), [4])],
        [DistillationKL(), MarginMSE()],
        [DPO(), KL(), SFT()],
        [PseudoLabelInfoNCE(use_labels=True)],
    ],
)
def test_several_positives_that_no_term_looks_at_are_refused(terms):
    names = ", ".join(term.name for term in terms)
    with pytest.raises(ValueError, match=rf"num_positives=3 of 'a', but {names} would look at the first positive"):
        check_positives(terms, 3, " of 'a'")
    check_positives(terms, 1)
    check_positives([*terms[1:], Matryoshka(InfoNCE(positives="all"), [4])], 3)


def test_several_positives_are_checked_dataset_by_dataset(tmp_path):
    data = mixture(tmp_path, (PASSAGES, ["info_nce"]), (CHAT, ["sft"]))
    data.num_positives = 2
    objective = Objective([InfoNCE(positives="all"), SFT()])
    with pytest.raises(ValueError, match=r"num_positives=2 of '.*set1\.jsonl', but sft would look at the first"):
        check_rows(objective, data)
    data.source.sets[1] = replace(data.source.sets[1], num_positives=1)
    check_rows(objective, data)
