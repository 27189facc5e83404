"""Both directions of generation, from texts: against plain transformers, by hand, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_gradcache import make_batch
from test_objective import with_generation
from tiny import make_tokenizer
from tokenizers import processors

from ullme.batch import LikelihoodKind
from ullme.data.collator import Collator
from ullme.data.sampler import Draw
from ullme.engine.objective import Objective
from ullme.engine.presets import grl_terms
from ullme.engine.reference import AdaptersOff, Cached
from ullme.engine.scoring import score
from ullme.losses import CPO, DPO, KL, KTO, SFT, Chunk, InfoNCE
from ullme.losses.ranking import rank_of_first
from ullme.models.trained_weights import contract
from ullme.prompts import Prompts, PromptTokenizer

DRAWS = [
    (4, Draw("who founded the town?", "The old mill.", ["A river flows past it.", "1984"], None)),
    (9, Draw("numbers", "3.14 appears in many documents {query}.", ["Bright copper kettles {text}.", "short"], "Own")),
]
PROMPTS = Prompts(
    query="{text}",
    generation="Instruct: {instruction}\nQ: {text}\nA:",
    query_generation="{instruction} Passage: {passage}\nQuery:{query}",
    instruction="Task",
)
KINDS: tuple[LikelihoodKind, ...] = ("passage_given_query", "query_given_passage", "passage")


def tokenizer_of(kind: str):
    tokenizer = make_tokenizer().__class__(
        tokenizer_object=make_tokenizer().backend_tokenizer.__class__.from_str(
            make_tokenizer().backend_tokenizer.to_str()
        ),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    template = {"begins": "<s> $A", "bare": "$A", "ends": "<s> $A </s>"}[kind]
    tokens = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return tokenizer


def by_hand(llm, prompt: list[int], target: list[int]) -> float:
    """Σ log π of the target's tokens after the prompt, through transformers' own forward."""
    with torch.no_grad():
        logps = llm(input_ids=torch.tensor([prompt + target])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) + n - 1, token].item() for n, token in enumerate(target))


@pytest.mark.parametrize("kind", ["begins", "bare", "ends"])
def test_likelihoods_of_texts_are_transformers(kind, make_model):
    """The templates are filled in here once more, by string replacement."""
    model, tokenizer = make_model("gpt2").double().eval(), tokenizer_of(kind)
    batch = Collator(PromptTokenizer(tokenizer, PROMPTS), 64, 64, generation=KINDS)(DRAWS)
    assert tokenizer("a")["input_ids"] != tokenizer_of({"begins": "bare", "bare": "ends", "ends": "bare"}[kind])("a")

    def bare(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    begin = [] if kind == "bare" else [1]
    found = {k: score(model, batch, torch.ones(2, 3, dtype=torch.bool), True, k) for k in KINDS}
    for b, (_, drawn) in enumerate(DRAWS):
        task = drawn.instruction or "Task"
        for c, passage in enumerate([drawn.positive, *drawn.negatives]):
            expected: dict[str, tuple[str, str]] = {
                "passage_given_query": (f"Instruct: {task}\nQ: {drawn.query}\nA:", passage),
                "query_given_passage": (f"{task} Passage: {passage}\nQuery:", drawn.query),
                "passage": (f"Instruct: {task}\nQ: \nA:", passage),
            }
            for likelihood, (prompt, text) in expected.items():
                logps, lengths = found[likelihood]  # type: ignore[index]
                value = by_hand(model.causal_lm, begin + bare(prompt), [*bare(text), 2])
                assert value < -5
                assert logps[b, c].item() == pytest.approx(value, rel=1e-9), (likelihood, b, c)
                assert lengths[b, c] == len(bare(text)) + 1


def test_rows_of_query_generation_are_cut_as_the_others():
    """A passage keeps passage_max_length tokens whatever its template; a query that was cut has no end token."""
    tokenizer = tokenizer_of("ends")
    prompts = replace(PROMPTS, query_generation="P: {passage}\nQ:{query}")
    drawn = Draw("qrqrqrqr", "pppppppppp", ["xyx"], None)  # pp is one token; q, r, x and y are one each
    batch = Collator(PromptTokenizer(tokenizer, prompts), 6, 4, generation=KINDS)([(0, drawn)])
    rows = batch.generation_rows("query_given_passage")

    def read(part) -> list[str]:
        return [
            "".join(tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())).replace("Ġ", " ").replace("Ċ", "\n")
            for ids, mask in zip(part.input_ids, part.attention_mask, strict=True)
        ]

    assert read(rows.prompts) == [f"<s>P: {'pp' * 4}\nQ:", "<s>P: xyx\nQ:"]
    assert read(rows.targets) == ["qrqrqr"]
    assert rows.lengths(torch.Size([1, 2])).tolist() == [[6, 6]]


def test_a_prompt_is_cut_alike_in_any_company():
    """A row with a longer instruction of its own gives the others of its batch no more room."""
    rows = [(0, Draw("numbers " * 9, "short " * 9, ["1984"], "T")), (1, Draw("q", "p", ["n"], "A longer instruction"))]
    collate = Collator(PromptTokenizer(make_tokenizer(), PROMPTS), 8, 6, generation=KINDS)
    alone, together = collate(rows[:1]), collate(rows)
    for kind in KINDS:
        one, both = alone.generation_rows(kind), together.generation_rows(kind)
        assert one.keys is not None
        assert both.keys is not None
        assert torch.equal(one.keys, both.keys[:2]), kind
        assert both.prompts.host_lengths[-1] > 8


@pytest.mark.parametrize(
    "template", ["{query}", "{passage} Q:", "{passage} {query} A:", "{passage}{passage}{query}", "{text} {query}"]
)
def test_a_query_template_without_its_places_is_refused(template):
    with pytest.raises(
        ValueError, match=r"prompts\.query_generation=.*must hold \{passage\} once and end with \{query"
    ):
        Prompts(query_generation=template)
    with pytest.raises(
        ValueError, match=r"unknown placeholder \{text\}; use \{passage\}, \{query\} or \{instruction\}"
    ):
        Prompts(query_generation="{text} {passage} {query}")


def test_a_contract_from_before_has_the_default_template(make_model):
    stored = contract(make_model())["prompts"]
    assert stored.pop("query_generation") == Prompts().query_generation
    assert Prompts.from_dict(stored) == make_model().prompts


def test_dpo_on_queries_is_the_difference_of_mutual_informations(make_model):
    """Bayes: with log π(q|p) = log π(p|q) + log π(q) − log π(p), lengths and priors cancel. Here by hand."""
    model, batch = make_model("gpt2").double().eval(), with_generation(make_batch())
    everything = torch.ones_like(batch.passage_keys, dtype=torch.bool)
    with torch.no_grad():
        policy, _ = score(model, batch, everything, True, "query_given_passage")
        reference = AdaptersOff().logps(model, batch, everything, True, "query_given_passage")
    ratio = policy - reference
    expected = -torch.nn.functional.logsigmoid(0.1 * (ratio[:, :1] - ratio[:, 1:])).mean()
    logs = Objective([DPO(direction="query_given_passage")]).full_batch(model, batch)
    assert logs["dpo"].item() == pytest.approx(expected.item(), rel=1e-9)
    other = Objective([DPO()]).full_batch(model, batch)["dpo"].item()
    assert abs(logs["dpo"].item() - other) > 1e-4


@pytest.mark.parametrize("direction", ["query_given_passage", "gain"])
@pytest.mark.parametrize("teacher", ["policy", "reference"])
def test_the_kl_of_each_direction_and_teacher_by_hand(direction, teacher, make_model):
    model, batch = make_model("gpt2").double().eval(), with_generation(make_batch())
    everything = torch.ones_like(batch.passage_keys, dtype=torch.bool)

    def logps(kind: LikelihoodKind) -> torch.Tensor:
        if teacher == "reference":
            return AdaptersOff().logps(model, batch, everything, True, kind)
        with torch.no_grad():
            return score(model, batch, everything, True, kind)[0]

    if direction == "gain":
        assert batch.generation is not None
        lengths = batch.generation.targets.attention_mask.sum(1).view(5, 3)
        scores = (logps("passage_given_query") - logps("passage")) / lengths
    else:
        assert batch.query_generation is not None
        scores = logps("query_given_passage") / batch.query_generation.targets.attention_mask.sum(1)[:, None]
    with torch.no_grad():
        queries = model(batch.queries.input_ids, batch.queries.attention_mask)["rep"]
        passages = model(batch.passages.input_ids, batch.passages.attention_mask)["rep"].view(5, 3, -1)
    retrieval = (torch.einsum("bd,bcd->bc", queries, passages) / 0.05).softmax(1)
    generation = (scores / 0.25).softmax(1)
    expected = (generation * (generation / retrieval).log()).sum(1).mean()
    kl = KL(direction, 0.05, 0.25, teacher=teacher, divergence="generation_to_retrieval")
    logs = Objective([kl]).full_batch(model, batch)
    assert logs["kl"].item() == pytest.approx(expected.item(), rel=1e-9)
    order = scores.argsort(1, descending=True)
    ranks = (order == 0).nonzero()[:, 1] + 1
    assert logs["teacher_mrr"].item() == pytest.approx((1 / ranks).mean().item())
    assert logs["teacher_accuracy"].item() == pytest.approx((ranks == 1).double().mean().item())
    assert 0 < logs["teacher_accuracy"] < 1


def test_ranks_of_equal_scores_are_their_mean():
    scores = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.2, 0.2, 0.7]])
    accuracy, reciprocal = rank_of_first(scores)
    torch.testing.assert_close(accuracy, torch.tensor([1, 0, 1 / 2, 1 / 3, 0], dtype=torch.double))
    torch.testing.assert_close(reciprocal, 1 / torch.tensor([1, 3, 1.5, 2, 2.5], dtype=torch.double))


def test_the_old_name_of_the_kls_divergence_is_understood(caplog):
    old = KL("generation_to_retrieval", 0.1)  # type: ignore[arg-type]
    assert (old.direction, old.divergence) == ("passage_given_query", "generation_to_retrieval")
    assert "KL.divergence" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SFT(direction="gain"), r"SFT\.direction='gain': choose passage_given_query or query_given_passage"),
        (lambda: DPO(direction="backwards"), r"DPO\.direction='backwards'"),
        (lambda: KL("backwards"), r"KL\.direction='backwards': choose .* or gain"),
        (lambda: KL(teacher="nobody"), r"KL\.teacher='nobody': choose policy or reference"),
        (lambda: KL(divergence="jensen"), r"KL\.divergence='jensen'"),
    ],
)
def test_unknown_choices_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_preset_hands_its_options_on():
    terms: list[Any] = grl_terms("sft", direction="query_given_passage", teacher="reference", kl_weight=3.0)
    assert [type(term) for term in terms] == [InfoNCE, SFT, KL]
    assert [term.direction for term in terms[1:]] == ["query_given_passage"] * 2
    assert (terms[2].teacher, terms[2].weight) == ("reference", 3.0)
    for kind, made in (("dpo", DPO), ("sft", SFT), ("kto", KTO), ("cpo", CPO)):
        given = {"temperature": 0.1, "beta": 0.2, "contrastive_weight": 0.3, "generation_weight": 0.4, "kl_weight": 0.6}
        given |= {"retrieval_temperature": 0.7, "generation_temperature": 0.8, "detach_generation": True}
        given |= {"divergence": "generation_to_retrieval"}
        contrastive, generation, kl = grl_terms(kind, **given)
        assert (contrastive.temperature, contrastive.weight) == (0.1, 0.3)
        assert type(generation) is made
        assert (getattr(generation, "beta", 0.2), generation.weight) == (0.2, 0.4)
        assert (kl.retrieval_temperature, kl.generation_temperature, kl.weight) == (0.7, 0.8, 0.6)
        assert kl.detach_generation
        assert kl.divergence == "generation_to_retrieval"
    gain: list[Any] = grl_terms(direction="gain")
    assert [term.direction for term in gain[1:]] == ["passage_given_query", "gain"]


class Refusing(AdaptersOff):
    """Nothing may be computed any more."""

    def logps(self, *args, **kwargs):
        raise AssertionError("computed again")


def test_a_warm_cache_serves_every_direction_without_a_forward(make_model, tmp_path):
    """One look-up a step; what the worker hashed and what is hashed here are the same."""
    model = make_model().train()
    batch = Collator(PromptTokenizer(make_tokenizer(), PROMPTS), 64, 64, generation=KINDS)(DRAWS)
    terms = [DPO(), KL("query_given_passage", teacher="reference")]
    losses = []
    for source, carried in ((AdaptersOff(), True), (Refusing(), True), (Refusing(), False)):
        objective = Objective(terms, Cached(tmp_path / "cache", source))
        objective.check(model, 2)
        hashed = {field: replace(getattr(batch, field), keys=None) for field in ("generation", "query_generation")}
        losses.append(objective.full_batch(model, batch if carried else replace(batch, **hashed))["loss"].item())
    assert losses[0] == pytest.approx(losses[1]) == pytest.approx(losses[2])
    assert losses[0] == pytest.approx(Objective(terms).full_batch(model, batch)["loss"].item(), rel=1e-5)


def test_a_cache_rounds_no_likelihood_of_a_model_in_float64(make_model, tmp_path):
    model, batch = make_model("gpt2").double().eval(), with_generation(make_batch())
    everything = torch.ones_like(batch.passage_keys, dtype=torch.bool)
    cached = Cached(tmp_path, AdaptersOff())
    cached.prepare(model, "64-true")
    cold, warm = (cached.logps(model, batch, everything, True) for _ in range(2))
    assert cached.hits == cached.misses == everything.numel()
    computed = AdaptersOff().logps(model, batch, everything, True)
    assert computed.dtype == torch.float64
    assert torch.equal(cold, computed)
    assert torch.equal(warm, computed)


def test_a_cache_of_the_other_direction_or_template_is_refused(make_model, tmp_path):
    model, query = make_model(), ("query_given_passage",)
    Cached(tmp_path, AdaptersOff()).prepare(model, "32-true")
    with pytest.raises(ValueError, match=r"another direction: it holds .* passage_given_query, .*query_given_passage"):
        Cached(tmp_path, AdaptersOff()).prepare(model, "32-true", query)
    Cached(tmp_path / "query", AdaptersOff()).prepare(model, "32-true", query)
    with pytest.raises(ValueError, match="another direction"):
        Cached(tmp_path / "query", AdaptersOff()).prepare(model, "32-true")
    model.prompts = replace(model.prompts, generation="{text} A:")  # which this direction does not look at
    Cached(tmp_path / "query", AdaptersOff()).prepare(model, "32-true", query)
    model.prompts = replace(model.prompts, query_generation="{passage} Q:{query}")
    with pytest.raises(ValueError, match="made with another query_generation"):
        Cached(tmp_path / "query", AdaptersOff()).prepare(model, "32-true", query)


def test_lengths_come_from_the_batch(make_model):
    """Also those of candidates whose likelihood nobody asked for."""
    seen: list[Chunk] = []

    class Watching(SFT):
        def forward(self, chunk):
            seen.append(chunk)
            return super().forward(chunk)

    batch = with_generation(make_batch())
    Objective([Watching()]).full_batch(make_model().train(), batch)
    assert batch.generation is not None
    assert torch.equal(seen[0].lengths.flatten(), batch.generation.targets.attention_mask.sum(1))
    assert (seen[0].policy_logps[:, 1:] == 0).all()


def test_the_engine_loads_neither_lightning_nor_transformers():
    modules = "ullme.trainer, ullme.engine.presets, ullme.engine.objective, ullme.losses"
    program = f"import sys, {modules}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "ullme"} <= set(found)
    assert not {"lightning", "pytorch_lightning", "torchmetrics", "transformers", "peft", "datasets"} & set(found)
