"""Several datasets in one run: batches of one dataset at a time, each with its own rules."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from ullme.batch import Representations
from ullme.data.collator import Collator
from ullme.data.datamodule import ULLMEDataModule
from ullme.data.mixture import Mixture, MixtureSampler, TrainSet, epoch_batches
from ullme.data.sampler import Draw
from ullme.data.sources import open_source
from ullme.losses import InfoNCE
from ullme.losses.info_nce import info_nce
from ullme.prompts import Prompts, PromptTokenizer


def write(folder, name: str, rows: int, negatives: int = 2) -> str:
    lines = [
        {"query": f"{name} q{n}", "pos": [f"{name} p{n}"], "neg": [f"{name} n{n}-{k}" for k in range(negatives)]}
        for n in range(rows)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def mixture(folder, **rules) -> Mixture:
    """Rows 0-12 are of a, 13-17 of b."""
    sets = [TrainSet(write(folder, "a", 13)), TrainSet(write(folder, "b", 5), **rules)]
    return Mixture(sets, [open_source(one.train) for one in sets])


def batches(sampler) -> list[list[int]]:
    return [[row for row, _ in batch] for batch in sampler]


def test_a_batch_is_of_one_dataset_and_an_epoch_meets_each_row_once(tmp_path):
    sampler = MixtureSampler(mixture(tmp_path), 4, seed=0)
    found = batches(sampler)
    assert len(found) == len(sampler) == 3 + 1
    kinds = Counter()
    for batch in found:
        (kind,) = {row >= 13 for row in batch}
        kinds[kind] += 1
        assert len(set(batch)) == 4
    assert kinds == {False: 3, True: 1}
    assert max(Counter(row for batch in found for row in batch).values()) == 1
    assert batches(sampler) != found  # the next epoch


@pytest.mark.parametrize(("weight", "expected"), [(0.34, 1), (1, 3), (2, 6), (2.34, 7)])
def test_weights_count_passes(tmp_path, weight, expected):
    sets = [TrainSet(write(tmp_path, "a", 13), weight=weight), TrainSet(write(tmp_path, "b", 5))]
    sampler = MixtureSampler(Mixture(sets, [open_source(one.train) for one in sets]), 4, seed=0)
    found = [batch for batch in batches(sampler) if batch[0] < 13]
    assert len(found) == expected
    times = Counter(row for batch in found for row in batch)
    assert max(times.values()) <= -(-expected // 3)


def test_shares_follow_from_rows_to_the_power_alpha():
    """By hand: 100, 25 and 1 full batches; their roots are 10, 5 and 1, of 16."""
    assert epoch_batches([100, 25, 1], [1, 1, 1]) == [100, 25, 1]
    assert epoch_batches([100, 25, 1], [1, 1, 1], 0.5) == [round(126 * root / 16) for root in (10, 5, 1)] == [79, 39, 8]
    assert epoch_batches([100, 25, 1], [1, 1, 1], 0) == [42, 42, 42]
    # weights 1, 2, 4: 100 + 50 + 4 batches; weighted roots 10, 10 and 4, of 24
    assert epoch_batches([100, 25, 1], [1, 2, 4], 0.5) == [round(154 * part / 24) for part in (10, 10, 4)]
    assert epoch_batches([10**9, 1], [1, 1], 1.0)[1] == 1  # every dataset is met
    assert epoch_batches([3, 1], [0.34, 1]) == [1, 1]


def test_alpha_counts_rows_after_max_rows_and_meets_each_of_a_pass_once(tmp_path, caplog):
    """32 of 60 rows and 8 rows are 8 and 2 batches of 4; with α = 0, 5 batches of each in an epoch of 10."""
    sets = [TrainSet(write(tmp_path, "a", 60), max_rows=32), TrainSet(write(tmp_path, "b", 8))]
    found = {}
    for alpha in (1.0, 0.0):
        module = ULLMEDataModule(datasets=sets, batch_size=4, num_hard_negatives=1, mixture_alpha=alpha, num_workers=0)
        with caplog.at_level("INFO"):
            module.setup("fit")
        found[alpha] = batches(module._sampler(0, 1))
    assert [Counter(batch[0] < 32 for batch in found[alpha]) for alpha in (1.0, 0.0)] == [
        {True: 8, False: 2},
        {True: 5, False: 5},
    ]
    times = Counter(row for batch in found[0.0] for row in batch if row >= 32)
    assert set(times) == set(range(32, 40))
    assert set(times.values()) == {2, 3}  # two and a half passes
    assert "b.jsonl: 5 of 10 batches of an epoch, 2.50 passes over its rows" in caplog.text


def test_epochs_and_ranks_and_resuming_are_pure_functions(tmp_path):
    both = mixture(tmp_path)
    whole = MixtureSampler(both, 4, seed=3)
    epochs = [batches(whole), batches(whole)]
    later = MixtureSampler(both, 4, seed=3, epoch=1, start_batch=2)
    assert batches(later) == epochs[1][2:]
    ranks = [batches(MixtureSampler(both, 4, seed=3, rank=r, world_size=2)) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == epochs[0]
    assert batches(MixtureSampler(both, 4, seed=4)) != epochs[0]


def test_passes_and_epochs_put_other_rows_together_and_leave_none_out(tmp_path):
    """13 rows in batches of 4, two passes an epoch: each pass leaves out one row, not always the same."""
    sets = [TrainSet(write(tmp_path, "a", 13), weight=2)]
    sampler = MixtureSampler(Mixture(sets, [open_source(one.train) for one in sets]), 4, seed=0)
    found = [frozenset(batch) for _ in range(3) for batch in batches(sampler)]
    assert len(found) == 3 * 6
    assert len(set(found)) > 15  # by chance two of 715 possible ones may be equal
    assert set().union(*found) == set(range(13))


def test_datasets_follow_one_another_in_no_fixed_order(tmp_path):
    sets = [TrainSet(write(tmp_path, "a", 40)), TrainSet(write(tmp_path, "b", 40))]
    sampler = MixtureSampler(Mixture(sets, [open_source(one.train) for one in sets]), 4, seed=0)
    kinds = [batch[0] >= 40 for batch in batches(sampler)]
    changes = sum(a != b for a, b in pairwise(kinds))
    assert 3 < changes < 18
    assert [batch[0] >= 40 for batch in batches(sampler)] != kinds  # in the next epoch


def test_the_old_order_of_a_mixture(tmp_path):
    """As the releases before version 2 of the order computed it."""
    sets = [TrainSet(write(tmp_path, "a", 13), weight=2), TrainSet(write(tmp_path, "b", 5))]
    both = Mixture(sets, [open_source(one.train) for one in sets])
    passes = [np.random.default_rng([3, 1, 0, n]).permutation(13)[:12].reshape(3, 4) for n in range(2)]
    passes.append(np.random.default_rng([3, 1, 1, 0]).permutation(5)[:4].reshape(1, 4) + 13)
    expected = np.random.default_rng([3, 1]).permutation(np.concatenate(passes)).tolist()
    assert batches(MixtureSampler(both, 4, seed=3, epoch=1, order_version=1)) == expected
    assert batches(MixtureSampler(both, 4, seed=3, epoch=1)) != expected


def test_rows_carry_their_datasets_rules_and_borrow_from_it_alone(tmp_path):
    both = mixture(tmp_path, instruction="sort", in_batch_negatives=False, symmetric=True)
    a, b = (both.draw(row, 0, 0, 4, "borrow") for row in (2, 15))
    assert (a.query, a.instruction, a.in_batch_negatives, a.symmetric) == ("a q2", None, True, False)
    assert (b.query, b.instruction, b.in_batch_negatives, b.symmetric) == ("b q2", "sort", False, True)
    assert all(text.startswith("b ") for text in [b.positive, *b.negatives])
    assert len(set(b.negatives)) == 4
    assert both[15].query == "b q2"
    assert both.num_negatives.tolist() == [2] * 18


def test_a_rows_own_instruction_goes_before_its_datasets(tmp_path):
    rows = [{"query": "q", "pos": ["p"]}, {"query": "r", "pos": ["s"], "prompt": "own"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    one = Mixture([TrainSet(str(path), instruction="the dataset's")], [open_source(str(path))])
    assert [one.draw(row, 0, 0, 0, "borrow").instruction for row in range(2)] == ["the dataset's", "own"]


def test_the_collator_puts_the_rules_into_the_batch():
    from tiny import make_tokenizer

    tokenizer = PromptTokenizer(make_tokenizer(), Prompts(query="{instruction}|{text}", passage="P:{text}"))
    collator = Collator(tokenizer, 64, 64)
    plain = collator([(0, Draw("q", "p", ["n"], None))])
    assert plain.isolated is None
    batch = collator([(n, Draw(f"q{n}", "p", ["n"], "do", False, True)) for n in range(3)])
    assert batch.isolated.tolist() == [True] * 3
    assert batch[1:].isolated.tolist() == [True] * 2
    assert batch.to("cpu").isolated.tolist() == [True] * 3
    like_query = tokenizer(["p", "n"], "query", max_length=64, instruction="do")
    assert torch.equal(batch.passages.input_ids[:2, : like_query.input_ids.shape[1]], like_query.input_ids)


def representations(isolated) -> Representations:
    generator = torch.Generator().manual_seed(0)
    q = torch.nn.functional.normalize(torch.randn(4, 6, generator=generator, dtype=torch.double), dim=-1)
    p = torch.nn.functional.normalize(torch.randn(4, 3, 6, generator=generator, dtype=torch.double), dim=-1)
    return Representations(q, p, torch.arange(12).view(4, 3), isolated)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_isolated_queries_see_their_own_candidates_only(bidirectional):
    term = InfoNCE(0.1, bidirectional=bidirectional)
    reps = representations(torch.tensor([True, False, True, False]))
    rows = []
    for b, alone in enumerate(reps.isolated.tolist()):
        passages = reps.passages[b] if alone else reps.passages.flatten(0, 1)
        positive = torch.tensor([0 if alone else 3 * b])
        loss = info_nce(reps.queries[b : b + 1], passages, positive, None, 0.1)
        if bidirectional:
            queries = reps.queries[b : b + 1] if alone else reps.queries
            loss = (loss + info_nce(reps.passages[b, :1], queries, torch.tensor([0 if alone else b]), None, 0.1)) / 2
        rows.append(loss)
    assert term(reps).item() == pytest.approx(torch.stack(rows).mean().item(), abs=1e-12)
    assert abs(term(reps) - term(representations(None))) > 1e-3


def test_all_isolated_is_in_batch_negatives_off():
    reps = representations(torch.ones(4, dtype=torch.bool))
    off = InfoNCE(0.1, in_batch_negatives=False)(representations(None))
    assert InfoNCE(0.1)(reps).item() == pytest.approx(off.item(), abs=1e-12)


def test_the_objective_hands_the_batchs_flag_to_the_loss(make_model, tmp_path):
    from ullme.engine.objective import Objective

    model = make_model().eval()
    sets = [TrainSet(write(tmp_path, "a", 6), in_batch_negatives=False)]
    data = ULLMEDataModule(datasets=sets, batch_size=6, num_hard_negatives=2, num_workers=0, query_max_length=100)
    batch = next(iter(data.train_dataloader_for(model.prompt_tokenizer)))
    on, off = (Objective([InfoNCE(in_batch_negatives=value)]) for value in (True, False))
    losses = [o.grad_cache(model, batch, [slice(0, 2), slice(2, 6)])["loss"].item() for o in (on, off)]
    losses.append(on.full_batch(model, batch)["loss"].item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[2] == pytest.approx(losses[1], abs=1e-6)


def test_short_rows_are_dropped_within_their_dataset(tmp_path, tokenizer):
    sets = [TrainSet(write(tmp_path, "a", 8)), TrainSet(write(tmp_path, "b", 8, negatives=4))]
    data = ULLMEDataModule(datasets=sets, batch_size=4, num_hard_negatives=2, short_rows="drop", num_workers=0)
    data.setup("fit")
    assert len(data.source) == 16
    with pytest.raises(ValueError, match="short_rows=drop leaves no row"):
        ULLMEDataModule(datasets=sets, batch_size=4, num_hard_negatives=3, short_rows="drop").setup("fit")


def test_a_positive_of_the_query_in_another_dataset_is_not_borrowed(tmp_path):
    lines = {"a": [("q", "a1"), ("x", "b1"), ("y", "c1")], "b": [("q", "b1"), ("z", "d1")]}
    for name, pairs in lines.items():
        rows = [json.dumps({"query": query, "pos": [positive]}) for query, positive in pairs]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    sets = [TrainSet(str(tmp_path / f"{name}.jsonl")) for name in lines]
    both = Mixture(sets, [open_source(one.train) for one in sets])
    assert {both.draw(0, epoch, 0, 1, "borrow").negatives[0] for epoch in range(20)} == {"c1"}


def test_a_row_keeps_its_negatives_where_they_are_unlabelled_candidates_of_its_query(tmp_path):
    """Nobody has judged those; a row without labels borrows neither them nor a known positive of its query."""
    labelled = [{"query": "q", "pos": ["p"], "neg": ["n", "m"]}, {"query": "x", "pos": ["y"]}]
    unlabelled = [("q", ["n", "p2"]), ("q", ["m", "c"]), ("z", ["p", "d"])]
    sets = []
    for name, rows in (
        ("a", labelled),
        ("b", [{"query": query, "candidates": candidates} for query, candidates in unlabelled]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sets.append(TrainSet(str(tmp_path / f"{name}.jsonl")))
    both = Mixture(sets, [open_source(one.train) for one in sets])
    for epoch in range(20):
        assert set(both.draw(0, epoch, 0, 2).negatives) == {"n", "m"}
        drawn = both.draw(2, epoch, 0, 2)
        assert {drawn.positive, *drawn.negatives} == {"n", "p2", "d"}


@pytest.mark.parametrize(
    ("negatives", "short_rows", "wrong"),
    [
        (2, "borrow", "8 of 8 rows have fewer than data.num_hard_negatives=3 negatives, and data.short_rows=borrow"),
        (2, "repeat", None),
        (3, "borrow", None),
        (0, "repeat", "8 of 8 rows have no negative at all, and data.short_rows=repeat"),
    ],
)
def test_without_in_batch_negatives_no_row_borrows(tmp_path, negatives, short_rows, wrong):
    sets = [
        TrainSet(write(tmp_path, "a", 8, 1)),
        TrainSet(write(tmp_path, "b", 8, negatives), in_batch_negatives=False),
    ]
    data = ULLMEDataModule(datasets=sets, batch_size=4, num_hard_negatives=3, short_rows=short_rows, num_workers=0)
    if wrong is None:
        data.setup("fit")
        own = {f"b n{n}-{k}" for n in range(8) for k in range(3)}
        drawn = [data.source.draw(row, 0, 0, 3, short_rows).negatives for row in range(8, 16)]
        assert {text for texts in drawn for text in texts} <= own
        return
    with pytest.raises(ValueError, match=f"data.datasets: .* has in_batch_negatives=false.*{wrong}"):
        data.setup("fit")


def test_a_dataset_has_its_own_number_of_positives(tmp_path, tokenizer):
    """Batches of a have two places for positives, batches of b one, and neither changes the other draws."""
    sets = [TrainSet(write(tmp_path, "a", 8)), TrainSet(write(tmp_path, "b", 8), num_positives=1)]
    options = {"batch_size": 4, "num_hard_negatives": 1, "num_workers": 0}
    data = ULLMEDataModule(datasets=sets, num_positives=2, **options)
    found = list(data.train_dataloader_for(PromptTokenizer(tokenizer, Prompts(query="{text}"))))
    assert {(bool((batch.row_ids >= 8).all()), batch.num_extra_positives) for batch in found} == {(False, 1), (True, 0)}
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=rf"num_positives={wrong} of 'a' must be at least 1"):
            TrainSet("a", num_positives=wrong)
        with pytest.raises(ValueError, match=rf"data\.num_positives={wrong} must be at least 1"):
            ULLMEDataModule("a", num_positives=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of them"),
        ({"train": "a", "datasets": []}, "give exactly one of them"),
        ({"datasets": []}, "holds no dataset"),
        ({"train": "a", "mixture_alpha": 0.5}, r"mixture_alpha=0\.5 weighs .* data\.train='a' is one dataset"),
        ({"train": "a", "mixture_alpha": -0.1}, r"data\.mixture_alpha=-0\.1 must be between 0 .* and 1"),
        ({"train": "a", "mixture_alpha": float("nan")}, r"data\.mixture_alpha=nan must be between"),
    ],
)
def test_what_to_train_on_is_said_once(options, message):
    with pytest.raises(ValueError, match=message):
        ULLMEDataModule(**options)


def test_a_dataset_below_a_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"b\.jsonl' has 5 rows, fewer than a batch of data\.batch_size=6"):
        MixtureSampler(mixture(tmp_path), 6, seed=0)


def test_a_weight_must_be_positive():
    with pytest.raises(ValueError, match=r"weight=0 of 'a' must be a positive number"):
        TrainSet("a", weight=0)


def test_texts_are_their_own_positives(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text("the old mill\na market\n")
    for source in (open_source(str(path), schema="text"),):
        assert [source[n].query for n in range(2)] == ["the old mill", "a market"]
        assert all(source[n].positives == (source[n].query,) for n in range(2))
    rows = tmp_path / "wiki.jsonl"
    rows.write_text(json.dumps({"text": " the old mill "}))
    record = open_source(str(rows), schema="text")[0]
    assert (record.query, record.positives, record.negatives) == ("the old mill", ("the old mill",), ())


@pytest.mark.parametrize("whose", ["row", "dataset"])
def test_an_instruction_that_leaves_no_room_for_the_query_is_refused_before_training(tmp_path, tokenizer, whose):
    """Cut behind its instruction, every query would be the same text."""
    row = {"query": "what", "pos": ["p"], "neg": ["n"]} | ({"prompt": "long " * 9} if whose == "row" else {})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 4))
    sets = [TrainSet(str(path), instruction="long " * 9 if whose == "dataset" else None)]
    prompts = PromptTokenizer(tokenizer, Prompts(query="{instruction}: {text}", instruction="short"))

    def loader(length: int):
        data = ULLMEDataModule(
            datasets=sets, batch_size=2, num_hard_negatives=1, num_workers=0, query_max_length=length
        )
        return data.train_dataloader_for(prompts)

    with pytest.raises(ValueError, match=r"query: max_length=40 tokens.*with the instruction 'long .*takes 47"):
        loader(40)
    assert "what" in tokenizer.decode(next(iter(loader(60))).queries.input_ids[0])


@pytest.mark.parametrize(
    "options",
    [{"columns": ["score"]}, {"schema": "bge"}, {"train_name": "default"}, {"train_split": "dev"}, {"max_rows": 3}],
)
def test_options_of_one_dataset_beside_several_are_refused(tmp_path, options):
    (name,) = options
    with pytest.raises(
        ValueError,
        match=rf"data\.{name}=.* is for data\.train; set data\.{name}=\w+, and give .* to each of data\.datasets",
    ):
        ULLMEDataModule(datasets=[TrainSet(write(tmp_path, "a", 4))], batch_size=2, **options)


def test_a_last_batch_that_is_not_full_is_not_promised_for_a_mixture(tmp_path):
    files = [write(tmp_path, name, 4) for name in "ab"]
    for options in ({"datasets": [TrainSet(files[0])]}, {"train": files, "mixture_alpha": 0.5}):
        with pytest.raises(ValueError, match=r"data\.drop_last=false: each batch of a mixture is of one dataset"):
            ULLMEDataModule(batch_size=2, drop_last=False, **options)
