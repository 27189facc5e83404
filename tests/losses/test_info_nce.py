"""InfoNCE against values worked out by hand and against its definition written as loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ullme.batch import Representations
from ullme.losses import InfoNCE, info_nce
from ullme.losses.false_negatives import FalseNegatives, above_margin, known_positives


def unit(*angles: float) -> torch.Tensor:
    """Points of the unit circle, so that a cosine is the cosine of a difference."""
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.double)


def random_reps(b: int = 4, c: int = 3, d: int = 6, keys: torch.Tensor | None = None) -> Representations:
    generator = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(b, d, dtype=torch.double, generator=generator), dim=-1)
    passages = torch.nn.functional.normalize(torch.randn(b, c, d, dtype=torch.double, generator=generator), dim=-1)
    return Representations(queries, passages, torch.arange(b * c).view(b, c) if keys is None else keys)


def test_by_hand():
    """cos 60° against cos 90° and cos 180°, τ = 0.5: −1 + ln(e + 1 + e^−2)."""
    loss = info_nce(unit(0), unit(math.pi / 3, math.pi / 2, math.pi), torch.tensor([0]), None, 0.5)
    assert loss.item() == pytest.approx(-1 + math.log(math.e + 1 + math.exp(-2)), abs=1e-12)


def by_loops(reps: Representations, tau: float, in_batch: bool, mask: bool, both_ways: bool) -> float:
    b, c, _ = reps.passages.shape
    forward, backward = [], []
    for i in range(b):
        positive = math.exp(reps.queries[i] @ reps.passages[i, 0] / tau)
        total = positive
        for j in range(b):
            for k in range(c):
                duplicate = bool(reps.passage_keys[j, k] == reps.passage_keys[i, 0])
                if (j, k) == (i, 0) or (mask and duplicate) or (not in_batch and j != i):
                    continue
                total += math.exp(reps.queries[i] @ reps.passages[j, k] / tau)
        forward.append(-math.log(positive / total))
        total = positive
        for j in range(b):
            if j != i and not (mask and reps.passage_keys[j, 0] == reps.passage_keys[i, 0]):
                total += math.exp(reps.queries[j] @ reps.passages[i, 0] / tau)
        backward.append(-math.log(positive / total))
    mean = sum(forward) / b
    return (mean + sum(backward) / b) / 2 if both_ways else mean


@pytest.mark.parametrize(
    ("in_batch", "mask", "both_ways"),
    [(True, False, False), (False, False, False), (True, True, False), (False, True, False), (True, True, True)],
)
def test_against_loops(in_batch, mask, both_ways):
    keys = torch.arange(12).view(4, 3)
    keys[2, 0] = keys[0, 0]  # two queries share their positive
    keys[3, 2] = keys[1, 0]  # and one's positive is another's hard negative
    keys[1, 1] = keys[1, 0]  # and one is its own hard negative
    reps = random_reps(keys=keys)
    loss = InfoNCE(0.1, in_batch, mask, both_ways)(reps)
    assert loss.item() == pytest.approx(by_loops(reps, 0.1, in_batch, mask, both_ways), abs=1e-12)


def test_every_option_matters():
    keys = torch.arange(12).view(4, 3)
    keys[2, 0] = keys[0, 0]
    reps = random_reps(keys=keys)
    options = [(0.1, True, True, False), (0.1, False, True, False), (0.1, True, False, False), (0.1, True, True, True)]
    values = [InfoNCE(*o)(reps).item() for o in [*options, (0.2, True, True, False)]]
    assert len({round(v, 6) for v in values}) == 5


def test_hand_written_in_batch_example_of_the_shared_positive():
    """Two rows with one text as positive: without the mask each would push its own positive away."""
    reps = Representations(unit(0, 0), unit(0, 0)[:, None], torch.tensor([[7], [7]]))
    assert InfoNCE(1.0)(reps).item() == pytest.approx(0, abs=1e-12)
    assert InfoNCE(1.0, mask_duplicates=False)(reps).item() == pytest.approx(math.log(2), abs=1e-12)


def test_order_of_queries_does_not_matter():
    reps = random_reps()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Representations(reps.queries[order], reps.passages[order], reps.passage_keys[order])
    assert InfoNCE()(reps).item() == pytest.approx(InfoNCE()(shuffled).item(), abs=1e-12)
    wrong = Representations(reps.queries[order], reps.passages, reps.passage_keys)
    assert InfoNCE()(wrong).item() != pytest.approx(InfoNCE()(reps).item(), abs=1e-3)


@pytest.mark.parametrize("both_ways", [False, True])
def test_gradient(both_ways):
    reps = random_reps(3, 2, 4)
    loss = InfoNCE(0.3, bidirectional=both_ways)
    assert torch.autograd.gradcheck(
        lambda q, p: loss(Representations(q, p, reps.passage_keys)),
        (reps.queries.requires_grad_(), reps.passages.requires_grad_()),
    )


def test_half_precision_under_autocast_is_float32():
    reps = random_reps(8, 3, 16)
    exact = InfoNCE(0.02)(reps)
    half = Representations(reps.queries.float(), reps.passages.float(), reps.passage_keys)
    with torch.autocast("cpu", torch.bfloat16):
        loss = InfoNCE(0.02)(half)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature=0: must be above 0"),
        ({"weight": -1}, "InfoNCE.weight=-1"),
        ({"bidirectional": True, "in_batch_negatives": False}, "bidirectional=true needs in_batch_negatives"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        InfoNCE(**options)


def sibling_reps(with_keys: bool = True) -> Representations:
    """Queries 0 and 2 are one query with two positives; query 3 has the second of them as a hard negative."""
    keys = torch.arange(12).view(4, 3)
    keys[3, 1] = keys[2, 0]
    query_keys = torch.tensor([5, 6, 5, 7]) if with_keys else None
    return replace(random_reps(keys=keys), query_keys=query_keys)


def sibling_by_loops(reps: Representations, tau: float, all_positives: bool, both_ways: bool) -> float:
    total = 0.0
    for i, query in enumerate(reps.queries):
        same = [j for j in range(4) if reps.query_keys[j] == reps.query_keys[i]]
        known = {reps.passage_keys[j, 0].item() for j in same}

        def score(j, k, query=query):
            return math.exp(query @ reps.passages[j, k] / tau)

        numerator = sum(score(j, 0) for j in same) if all_positives else score(i, 0)
        others = [(j, k) for j in range(4) for k in range(3) if reps.passage_keys[j, k].item() not in known]
        found = -math.log(numerator / (numerator + sum(score(*one) for one in others)))
        if both_ways:
            own = score(i, 0)
            rest = [math.exp(reps.queries[j] @ reps.passages[i, 0] / tau) for j in range(4) if j not in same]
            found = (found - math.log(own / (own + sum(rest)))) / 2
        total += found / 4
    return total


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("positives", ["one", "all"])
def test_positives_of_the_same_query_against_loops(positives, both_ways):
    reps = sibling_reps()
    loss = InfoNCE(0.2, positives=positives, bidirectional=both_ways)
    assert loss(reps).item() == pytest.approx(sibling_by_loops(reps, 0.2, positives == "all", both_ways), abs=1e-12)
    assert abs(loss(reps) - InfoNCE(0.2, bidirectional=both_ways, mask_siblings=False)(reps)) > 1e-3
    assert abs(loss(reps) - loss(replace(reps, query_keys=None))) > 1e-3


def test_a_siblings_positive_gets_no_gradient_from_the_query():
    """Query 0 and passages of query 2: its positive does not move for query 0, its negatives do."""
    reps = sibling_reps().as_leaves()
    zeros = torch.zeros(4, dtype=torch.long)
    InfoNCE(0.2).per_query(reps, zeros, [4])[0].backward()
    gradient = reps.passages.grad
    assert not gradient[2, 0].any()
    assert not gradient[3, 1].any()  # the same text, as a hard negative of another row
    assert gradient[2, 1].abs().max() > 1e-3
    assert gradient[0, 0].abs().max() > 1e-3
    unmasked = sibling_reps().as_leaves()
    InfoNCE(0.2, mask_siblings=False).per_query(unmasked, zeros, [4])[0].backward()
    assert unmasked.passages.grad[2, 0].abs().max() > 1e-3


def test_known_positives_of_many_and_of_one():
    own, positives = torch.arange(4), torch.tensor([10, 11, 12, 10])
    found = known_positives(own, torch.tensor([5, 6, 5, 5]), positives[:, None], torch.tensor([12, 11, 10, 13]))
    assert found.tolist() == [
        [True, False, True, False],
        [False, True, False, False],
        *[[True, False, True, False]] * 2,
    ]
    alone = known_positives(own, None, positives[:, None], positives)
    assert alone.tolist() == (positives[:, None] == positives).tolist()


def test_several_positives_by_hand():
    """−ln((e^a + e^b) / (e^a + e^b + e^c)) with cosines 1, 0 and −1, τ = 1."""
    mask = torch.tensor([[True, True, False]])
    loss = info_nce(unit(0), unit(0, math.pi / 2, math.pi), mask, None, 1.0)
    assert loss.item() == pytest.approx(-math.log((math.e + 1) / (math.e + 1 + math.exp(-1))), abs=1e-12)
    one = info_nce(unit(0), unit(0, 1, 2), torch.tensor([[True, False, False]]), None, 0.3)
    assert one.item() == pytest.approx(info_nce(unit(0), unit(0, 1, 2), torch.tensor([0]), None, 0.3).item(), abs=1e-12)


def test_margins_by_hand():
    scores, positive = torch.tensor([[0.5, 0.61, 0.55, float("nan")]]), torch.tensor([0.5])
    assert above_margin(scores, positive, margin=0.1).tolist() == [[False, True, False, False]]
    assert above_margin(scores, positive, margin=0).tolist() == [[False, True, True, False]]
    assert above_margin(scores, positive, ratio=0.95).tolist() == [[True, True, True, False]]
    assert above_margin(scores, positive, margin=0.2, ratio=1.15).tolist() == [[False, True, False, False]]


def test_a_ratio_of_a_negative_score_leaves_out_what_scores_above_it():
    """sentence-transformers' issue 3819: 0.95 · (−0.50) = −0.475, with which −0.49, above the positive, would be kept."""
    scores, positive = torch.tensor([[-0.49, -0.5, -0.52, -0.53, -0.8]]), torch.tensor([-0.5])
    assert above_margin(scores, positive, ratio=0.95).tolist() == [[True, True, True, False, False]]  # above −0.525
    assert above_margin(scores, positive, ratio=1.0).tolist() == [[True, False, False, False, False]]
    assert above_margin(scores, positive, ratio=1.1).tolist() == [[False] * 5]  # up to −0.45


def filtered_by_loops(reps: Representations, scores: torch.Tensor, rule: FalseNegatives) -> tuple[float, float]:
    """The loss, and the share left out; ``scores`` is (B, B * C), NaN where there is none."""
    loss, shares = 0.0, []
    for i in range(4):
        positive, kept, out = scores[i, 3 * i].item(), 0.0, 0
        own = math.exp(reps.queries[i] @ reps.passages[i, 0] / 0.2)
        for m in range(12):
            s = scores[i, m].item()
            if m == 3 * i:
                continue
            high = rule.margin is not None and s > positive + rule.margin
            high = high or (rule.ratio is not None and s > positive - (1 - rule.ratio) * abs(positive))
            out += high
            kept += 0 if high else math.exp(reps.queries[i] @ reps.passages[m // 3, m % 3] / 0.2)
        loss -= math.log(own / (own + kept)) / 4
        shares.append(out / 11)
    return loss, sum(shares) / 4


@pytest.mark.parametrize("source", ["student", "column", "guide"])
@pytest.mark.parametrize("limit", [{"margin": 0.05}, {"ratio": 0.9}])
def test_negatives_that_score_too_high_are_left_out(source, limit):
    generator = torch.Generator().manual_seed(4)
    guide = torch.nn.functional.normalize(torch.randn(4, 4, 5, dtype=torch.double, generator=generator), dim=-1)
    column = torch.rand(4, 3, dtype=torch.double, generator=generator)
    column[1, 2], column[2] = float("nan"), float("nan")
    reps = replace(random_reps(), columns={"score": column}, guide_queries=guide[:, 0], guide_passages=guide[:, 1:])
    scores = {
        "student": reps.queries @ reps.passages.flatten(0, 1).T,
        "guide": guide[:, 0] @ guide[:, 1:].reshape(12, 5).T,
        "column": torch.full((4, 12), float("nan"), dtype=torch.double),
    }[source]
    if source == "column":
        for i in range(4):
            scores[i, 3 * i : 3 * i + 3] = column[i]
    rule = FalseNegatives(**limit, scores=source)
    loss = InfoNCE(0.2, false_negatives=rule)
    expected, share = filtered_by_loops(reps, scores, rule)
    assert loss(reps).item() == pytest.approx(expected, abs=1e-12)
    assert loss.metrics(reps)["false_negative_share"].item() == pytest.approx(share, abs=1e-12)
    assert 0 < share < 0.9
    assert abs(expected - InfoNCE(0.2)(reps).item()) > 1e-3
    assert InfoNCE().metrics(reps) == {}


@pytest.mark.parametrize("options", [{"false_negatives": FalseNegatives(0.05)}, {"positives": "all"}])
def test_gradients_with_masks(options):
    reps = sibling_reps()
    loss = InfoNCE(0.3, **options)
    found = torch.autograd.gradcheck(
        lambda q, p: loss(replace(reps, queries=q, passages=p)),
        (reps.queries.clone().requires_grad_(), reps.passages.clone().requires_grad_()),
    )
    assert found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"give a margin \(0\.1, say\) or a ratio"),
        ({"ratio": 0.0}, r"ratio=0\.0: must be above 0"),
        ({"margin": float("nan")}, r"margin=nan: must be a number"),
        ({"margin": 0.1, "scores": "teacher"}, r"scores='teacher': choose student or column or guide"),
    ],
)
def test_limits_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        FalseNegatives(**options)


def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match=r"positives=all needs mask_siblings=true"):
        InfoNCE(positives="all", mask_siblings=False)
    with pytest.raises(ValueError, match=r"positives='some': choose one or all"):
        InfoNCE(positives="some")
    reps = replace(random_reps(), columns={"score": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"column='score' has one number a query; it needs one a candidate"):
        InfoNCE(false_negatives=FalseNegatives(0.1, scores="column"))(reps)
