from __future__ import annotations

import pickle
from copy import deepcopy
from dataclasses import replace
from itertools import chain

import pytest
import torch

from ullme.batch import NO_TEXT
from ullme.data.collator import Collator, EvalCollator, TrainDataset, length_sorted_batches, passage_key
from ullme.data.sampler import Draw
from ullme.data.sources import open_source
from ullme.prompts import Prompts, PromptTokenizer


@pytest.fixture
def prompt_tokenizer(tokenizer):
    return PromptTokenizer(tokenizer, Prompts(query="{instruction}|{text}", passage="P:{text}", instruction="task"))


def read(tokenizer, rows):
    return [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(rows.input_ids, rows.attention_mask, strict=True)]


DRAWS = [
    (5, Draw("qa", "pa", ["na1", "na2"], None)),
    (2, Draw("qb", "pb", ["nb1", "nb2"], "other")),
    (9, Draw("qc", "pc", ["pa", "nc2"], None)),
]


def test_each_query_keeps_its_own_candidates_positive_first(tokenizer, prompt_tokenizer):
    batch = Collator(prompt_tokenizer, 32, 32)(DRAWS)
    assert read(tokenizer, batch.queries) == ["task|qa", "other|qb", "task|qc"]
    assert read(tokenizer, batch.passages) == [
        f"P:{text}" for text in ("pa", "na1", "na2", "pb", "nb1", "nb2", "pc", "pa", "nc2")
    ]
    assert batch.num_candidates == 3
    assert batch.row_ids.tolist() == [5, 2, 9]
    for b, (_, drawn) in enumerate(DRAWS):  # list-major regrouping would give query b another query's passages
        own = read(tokenizer, batch[b : b + 1].passages)
        assert own == [f"P:{text}" for text in (drawn.positive, *drawn.negatives)]


@pytest.mark.parametrize("pooled", ["all", "text"])
def test_extra_positives_and_what_stands_in_for_them(tokenizer, pooled):
    prompts = Prompts(query="{instruction}|{text}", passage="P:{text}", instruction="task", pooled=pooled)
    extra = [("pe", None), (None, None), ("pf", "pe")]
    draws = [(n, drawn._replace(extra_positives=e)) for (n, drawn), e in zip(DRAWS, extra, strict=True)]
    batch = Collator(PromptTokenizer(tokenizer, prompts), 32, 32)(draws)
    texts = read(tokenizer, batch.extra_positives)
    assert [texts[n] for n in (0, 4, 5)] == ["P:pe", "P:pf", "P:pe"]
    assert batch.extra_positives.attention_mask.sum(1).tolist() == [4, 1, 1, 1, 4, 4]
    assert batch.extra_positives.pooled.sum(1).tolist() == (
        [4, 1, 1, 1, 4, 4] if pooled == "all" else [2, 1, 1, 1, 2, 2]
    )
    pe, pf = passage_key("pe"), passage_key("pf")
    assert batch.extra_positive_keys.tolist() == [[pe, NO_TEXT], [NO_TEXT, NO_TEXT], [pf, pe]]
    assert read(tokenizer, batch[2:].extra_positives) == ["P:pf", "P:pe"]
    assert batch[2:].extra_positive_keys.tolist() == [[pf, pe]]
    assert len(batch.embedded_lengths) == 3 + 9 + 6
    assert batch.num_tokens == batch.embedded_lengths.sum() == batch.embedded.num_tokens
    plain = Collator(PromptTokenizer(tokenizer, prompts), 32, 32)(DRAWS)
    assert torch.equal(batch.passages.input_ids, plain.passages.input_ids)
    assert plain.extra_positives is None
    assert batch.num_tokens == plain.num_tokens + 3 * 4 + 3


def test_extra_positives_of_a_symmetric_dataset_have_the_query_template(tokenizer, prompt_tokenizer):
    drawn = Draw("qb", "pb", [], "other", symmetric=True, extra_positives=("pc",))
    batch = Collator(prompt_tokenizer, 32, 32)([(0, drawn)])
    assert read(tokenizer, batch.extra_positives) == ["other|pc"]


def test_a_passage_template_has_the_rows_own_instruction_too(tokenizer):
    prompts = Prompts(query="{instruction}?{text}", passage="{instruction}|{text}", instruction="usual")
    draws = [(0, Draw("qa", "pa", ["na"], "other")), (1, Draw("qb", "pb", ["nb"], None))]
    collator = Collator(PromptTokenizer(tokenizer, prompts), 32, 32)
    assert read(tokenizer, collator(draws).passages) == ["other|pa", "other|na", "usual|pb", "usual|nb"]
    with pytest.raises(
        ValueError, match="passage: max_length=32 tokens, but the template alone with the instruction 'i"
    ):
        Collator(PromptTokenizer(tokenizer, prompts), 128, 32, longest_instruction="i" * 40)


def test_extra_positives_without_keys_are_refused(prompt_tokenizer):
    batch = Collator(prompt_tokenizer, 32, 32)(DRAWS)
    with pytest.raises(
        ValueError, match=r"9 extra positives of 3 queries do not fit extra_positive_keys of shape None"
    ):
        replace(batch, extra_positives=batch.passages)


def test_keys_are_equal_where_texts_are(prompt_tokenizer):
    batch = Collator(prompt_tokenizer, 32, 32)(DRAWS)
    texts = [[d.positive, *d.negatives] for _, d in DRAWS]
    flat = list(chain(*texts))
    equal_keys = batch.passage_keys.view(-1, 1) == batch.passage_keys.view(1, -1)
    equal_texts = torch.tensor([[a == b for b in flat] for a in flat])
    assert torch.equal(equal_keys, equal_texts)
    assert batch.passage_keys.dtype == torch.int64
    assert batch.passage_keys.shape == (3, 3)


def test_keys_are_stable_and_fit_int64():
    assert passage_key("a passage") == 0xDDC1A6194D980666 >> 1  # printf 'a passage' | b2sum -l 64
    assert all(0 <= passage_key(str(i)) < 2**63 for i in range(1000))
    assert len({passage_key(str(i)) for i in range(1000)}) == 1000
    assert passage_key("long " * 1000 + "a") != passage_key("long " * 1000 + "b")


def test_lengths_are_limited_each_on_its_side(prompt_tokenizer):
    batch = Collator(prompt_tokenizer, 7, 11)([(0, Draw("q" * 50, "p" * 50, ["n"], None))])
    assert batch.queries.input_ids.shape == (1, 7)
    assert batch.passages.input_ids.shape == (2, 11)
    assert batch.passages.attention_mask.sum(1).tolist() == [11, 3]


def test_no_hard_negatives(prompt_tokenizer):
    batch = Collator(prompt_tokenizer, 32, 32)([(0, Draw("q", "p", [], None)), (1, Draw("r", "s", [], None))])
    assert batch.num_candidates == 1
    assert len(batch.passages) == 2


def test_dataset_and_collator_travel_to_a_worker(write_jsonl, rows, prompt_tokenizer):
    dataset = TrainDataset(open_source(write_jsonl(rows)), seed=1, num_hard_negatives=2)
    collator = Collator(prompt_tokenizer, 32, 32)
    index = [(3, 0), (0, 0), (3, 1)]
    here = collator([dataset[i] for i in index])
    sent_dataset, sent_collator = pickle.loads(pickle.dumps((dataset, collator)))
    there = sent_collator([sent_dataset[i] for i in index])
    assert torch.equal(here.passages.input_ids, there.passages.input_ids)
    assert torch.equal(here.passage_keys, there.passage_keys)
    assert here.row_ids.tolist() == [3, 0, 3]


def test_eval_rows(tokenizer, prompt_tokenizer):
    rows = EvalCollator(prompt_tokenizer, "query", 32)([(4, "a"), (1, "bb")])
    assert read(tokenizer, rows.rows) == ["task|a", "task|bb"]
    assert rows.indices.tolist() == [4, 1]
    moved = rows.to("meta")
    assert moved.indices.device.type == moved.rows.input_ids.device.type == "meta"


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4, 10, 13])
def test_eval_batches_cover_every_text_with_as_many_batches_on_each_rank(world_size, count):
    texts = ["x" * ((7 * i) % 11) for i in range(count)]
    ranks = [length_sorted_batches(texts, 4, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {i for batches in ranks for batch in batches for i in batch} == set(range(count))
    first = ranks[0][0]
    assert len(texts[first[0]]) == max(map(len, texts)), "the longest first"
    if world_size == 1:
        assert sorted(chain(*ranks[0])) == list(range(count))


@pytest.mark.parametrize("special", ["", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_exactly_the_passage_and_its_end_are_scored(special):
    """The prompt is no part of the likelihood, and neither is a begin token; an end token is, once."""
    from tiny import make_tokenizer
    from tokenizers import processors

    tokenizer = deepcopy(make_tokenizer())
    ids = {"<s>": 1, "</s>": 2}
    template = processors.TemplateProcessing(
        single=special or "$A", special_tokens=[(token, n) for token, n in ids.items() if token in special]
    )
    tokenizer.backend_tokenizer.post_processor = template
    prompts = Prompts(query="{text}", generation="Q ({instruction}): {text}\nA:", instruction="task")
    batch = Collator(PromptTokenizer(tokenizer, prompts), 64, 64, generation=True)(DRAWS)
    assert batch.generation is not None
    begin = [1] if "<s>" in special else []

    def bare(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def rows(block):
        return [ids[mask.bool()].tolist() for ids, mask in zip(block.input_ids, block.attention_mask, strict=True)]

    asked = [f"Q ({drawn.instruction or 'task'}): {drawn.query}\nA:" for _, drawn in DRAWS]
    assert rows(batch.generation.prompts) == [begin + bare(text) for text in asked]
    texts = [text for _, drawn in DRAWS for text in (drawn.positive, *drawn.negatives)]
    assert rows(batch.generation.targets) == [[*bare(text), 2] for text in texts]  # query-major, the positive first


def test_long_generation_rows_keep_their_template_and_something_to_score(tokenizer):
    """A query loses its own end, never the template; a passage that is cut has no end token, and none has no token."""
    prompts = Prompts(query="{text}", generation="Question: {text}\nAnswer:")
    drawn = Draw("q" * 50, "p" * 50, ["n", "m" * 9], None)
    batch = Collator(PromptTokenizer(tokenizer, prompts), 6, 9, generation=True)([(0, drawn)])
    assert batch.generation is not None
    assert read(tokenizer, batch.generation.prompts) == ["Question: qqqqqq\nAnswer:"]
    assert read(tokenizer, batch.generation.targets) == ["p" * 9, "n</s>", "m" * 9]
    single = Collator(PromptTokenizer(tokenizer, prompts), 6, 1, generation=True)([(0, drawn)])
    assert single.generation is not None
    assert read(tokenizer, single.generation.targets) == ["p", "n", "m"]
    assert PromptTokenizer(tokenizer, prompts).target_ids([""], max_length=9) == [[1]]  # </s> alone
