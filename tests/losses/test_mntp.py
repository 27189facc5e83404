"""Masked next-token prediction: which tokens are masked, and where their likelihood is read."""

from __future__ import annotations

import copy

import pytest
import torch
from test_gradcache import assert_same_gradients, gradients
from tiny import TEXTS, make_tokenizer
from tokenizers import processors
from torch.nn.functional import pad

from ullme.batch import Batch
from ullme.distributed import random_seed
from ullme.engine.gradcache import chunk_slices
from ullme.engine.objective import Objective
from ullme.losses import MNTP, InfoNCE
from ullme.prompts import Prompts, PromptTokenizer, pad_rows
from ullme.token_rows import TokenRows

PROMPTS = Prompts(query="{text}", append_eos=True)


def rows_of(texts=TEXTS):
    return PromptTokenizer(make_tokenizer(), PROMPTS)(texts, "query", max_length=64)


def batch_of(texts=TEXTS) -> Batch:
    rows = rows_of(texts)
    n = len(texts)
    return Batch(rows, rows, torch.arange(n).view(n, 1), torch.arange(n))


@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_a_masked_token_is_read_off_the_position_before_it(path, attention, make_model):
    """By hand: transformers' logits at t - 1 for the token at t, masked tokens alone, under the embedding's attention."""
    model = make_model(attention=attention, attention_path=path, lora_name=None).eval()
    rows = pad_rows([[1, 40, 50, 60, 70], [1, 80, 90]], 0)
    masked = torch.full_like(rows.input_ids, -100)
    masked[0, 2], masked[0, 4], masked[1, 1] = 55, 77, 88
    with torch.no_grad():
        found = model(rows.input_ids, rows.attention_mask, masked=masked)
        for row, targets in enumerate(([(1, 55), (3, 77)], [(0, 88)])):
            ids = rows.input_ids[row][rows.attention_mask[row].bool()][None]
            logits = model.causal_lm(input_ids=ids, is_causal=attention == "causal").logits[0].log_softmax(-1)
            expected = sum(logits[place, token] for place, token in targets)
            assert found.logps[row].item() == pytest.approx(expected.item(), abs=1e-5)
    assert found.lengths.tolist() == [2, 1]


def test_attention_looks_at_what_follows_the_mask(make_model):
    model = make_model(lora_name=None).eval()
    ids = torch.tensor([[1, 40, 50, 60, 70], [1, 40, 50, 60, 71]])
    masked = torch.full_like(ids, -100)
    masked[:, 2] = 50
    a, b = model(ids, masked=masked).logps
    assert (a - b).abs() > 1e-3


@pytest.mark.parametrize("share", [0.01, 0.2, 0.8, 1.0])
def test_which_tokens_are_masked(share):
    rows, tokenizer = rows_of(), make_tokenizer()
    counts = torch.zeros(rows.input_ids.shape)
    for seed in range(300):
        replaced, masked = MNTP(share, replacement="mask").mask(rows, tokenizer, seed)
        chosen = masked != -100
        assert torch.equal(masked[chosen], rows.input_ids[chosen])
        assert (replaced.input_ids[chosen] == tokenizer.get_vocab()["_"]).all()
        assert torch.equal(replaced.input_ids[~chosen], rows.input_ids[~chosen])
        assert chosen.any(1).all()  # every text gives a loss
        counts += chosen
    special = torch.isin(rows.input_ids, torch.tensor(tokenizer.all_special_ids))
    may = rows.attention_mask.bool() & ~special
    assert (counts[~may] == 0).all()
    if share >= 0.2:
        assert (counts[may] / 300).mean() == pytest.approx(share, abs=0.02)


def test_a_texts_first_token_is_never_masked():
    """Nor one that is no special token, as where a tokenizer puts none in front: nothing stands before it."""
    _, masked = MNTP(1.0).mask(pad_rows([[40, 50, 60], [70, 80]], 0), make_tokenizer(), seed=0)
    assert masked.tolist() == [[-100, 50, 60], [-100, 80, -100]]


def test_bert_replacement():
    rows = pad_rows([[1, *range(10, 290)]] * 40, 0)
    tokenizer = make_tokenizer()
    replaced, masked = MNTP(0.5).mask(rows, tokenizer, seed=0)
    chosen = masked != -100
    share = lambda x: x[chosen].float().mean().item()  # noqa: E731
    assert share(replaced.input_ids == tokenizer.get_vocab()["_"]) == pytest.approx(0.8, abs=0.02)
    assert share(replaced.input_ids == rows.input_ids) == pytest.approx(0.1, abs=0.02)


def test_the_objective_is_the_mean_over_texts(make_model):
    model = make_model().eval()
    batch = batch_of()
    torch.manual_seed(5)
    logs = Objective([MNTP(0.3)]).full_batch(model, batch)
    torch.manual_seed(5)
    rows, masked = MNTP(0.3).mask(batch.queries, model.tokenizer, random_seed(torch.device("cpu")))
    found = model(rows.input_ids, rows.attention_mask, masked=masked)
    expected = -(found.logps / found.lengths).mean()
    assert logs["mntp"].item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    expected.backward()
    wanted = [p.grad for p in model.parameters() if p.requires_grad]
    assert sum(g.abs().sum() for g in wanted) > 0.1
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_rows_masks_depend_on_no_other_row_and_on_no_padding():
    """The same text in another place of the batch has other masks: they are no function of the text alone."""
    row = [1, *range(10, 60)]
    whole = pad_rows([row, row[:9], row], 0)
    replaced, masked = MNTP(0.5).mask(whole, make_tokenizer(), seed=7)
    for n, length in enumerate((51, 9, 51)):
        alone = MNTP(0.5).mask(whole[n : n + 1], make_tokenizer(), seed=7, first_row=n)
        left = TokenRows(pad(whole.input_ids[n : n + 1, :length], (4, 0)), pad(torch.ones(1, length), (4, 0)))
        padded = MNTP(0.5).mask(left, make_tokenizer(), seed=7, first_row=n)
        for found, expected in ((alone, slice(None, length)), (padded, slice(4, None))):
            assert torch.equal(found[0].input_ids[0, expected], replaced.input_ids[n, :length])
            assert torch.equal(found[1][0, expected], masked[n, :length])
    assert not torch.equal(masked[0], masked[2])
    assert not torch.equal(masked, MNTP(0.5).mask(whole, make_tokenizer(), seed=8)[1])


def test_what_replaces_a_token_does_not_depend_on_why_it_was_chosen():
    """Were one number used for both, all tokens of a share of 0.1 would get the mask token."""
    rows = pad_rows([[1, *range(10, 290)]] * 40, 0)
    replaced, masked = MNTP(0.1).mask(rows, make_tokenizer(), seed=0)
    chosen = masked != -100
    mask_token = (replaced.input_ids == make_tokenizer().get_vocab()["_"])[chosen]
    assert mask_token.float().mean().item() == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("chunks", [1, 2])
def test_chunks_change_neither_the_loss_nor_a_gradient(chunks, make_model):
    model, batch, objective = make_model().double().train(), batch_of(), Objective([InfoNCE(), MNTP(0.3)])
    torch.manual_seed(5)
    expected = objective.full_batch(model, batch)
    wanted = gradients(model)
    torch.manual_seed(5)
    found = objective.grad_cache(model, batch, chunk_slices(batch, chunks, None))
    assert found["mntp"].item() == pytest.approx(expected["mntp"].item(), rel=1e-6)
    assert_same_gradients(gradients(model), wanted, 1e-5)  # Llama's norms round to float32


def test_it_needs_no_generation_rows_and_joins_other_terms(make_model):
    model, objective = make_model(), Objective([InfoNCE(), MNTP(weight=0.5)])
    assert not objective.needs_generation
    objective.check(model, 0)
    logs = objective.grad_cache(model, batch_of(), [slice(0, 2), slice(2, 5)])
    assert logs["loss"].item() == pytest.approx(logs["info_nce"].item() + 0.5 * logs["mntp"].item(), rel=1e-5)


def test_a_text_that_cannot_be_masked_counts_nothing(make_model):
    rows = pad_rows([[1], [1, 40, 50]], 0)
    batch = Batch(rows, rows, torch.arange(2).view(2, 1), torch.arange(2))
    model = make_model().eval()
    logs = Objective([MNTP(1.0)]).full_batch(model, batch)
    assert torch.isfinite(logs["mntp"])
    assert logs["mntp"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"share": 0}, r"MNTP.share=0: must be above 0"), ({"replacement": "no"}, "choose mask or bert")],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        MNTP(**options)


def test_a_mask_token_that_the_vocabulary_lacks(make_model):
    with pytest.raises(ValueError, match=r"MNTP\.mask_token='<mask>' is no token of this LLM"):
        Objective([MNTP(mask_token="<mask>")]).check(make_model(), 0)


def test_what_the_tokenizer_appends_is_never_masked_though_it_is_no_special_token():
    tokenizer = copy.deepcopy(make_tokenizer())
    end = tokenizer.convert_tokens_to_ids("~")
    ends = processors.TemplateProcessing(single="$A ~", special_tokens=[("~", end)])
    tokenizer.backend_tokenizer.post_processor = ends
    rows = PromptTokenizer(tokenizer, PROMPTS)(TEXTS, "query", max_length=64)
    _, masked = MNTP(1.0, replacement="mask").mask(rows, tokenizer, seed=0)
    assert (rows.input_ids == end).sum() == len(TEXTS)
    assert not (masked == end).any()
    assert (masked != -100).sum() == rows.num_tokens - 2 * len(TEXTS)  # all but the first and the last of each
