"""InfoNCE with several positives of one row in the numerator, against values by hand and loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ullme.batch import NO_TEXT, Representations
from ullme.losses import InfoNCE, Matryoshka
from ullme.losses.false_negatives import FalseNegatives, known_positives, one_place_per_text
from ullme.losses.matryoshka import truncated


def unit(*angles: float) -> torch.Tensor:
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.double)


def random_reps(b: int = 4, c: int = 3, k: int = 2, d: int = 6) -> Representations:
    """Row 0 has three positives, row 1 one, row 2 three and row 3 two. Rows 0 and 2 have the same query, and one text of
    row 0 is also an extra positive of row 2, the other a hard negative of row 3. That of row 1 is one of row 3 too."""
    generator = torch.Generator().manual_seed(1)

    def rows(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, d, dtype=torch.double, generator=generator)
        return torch.nn.functional.normalize(drawn, dim=-1)

    queries, passages, extra = rows(b), rows(b, c), rows(b, k)
    keys, extra_keys = torch.arange(b * c).view(b, c), 100 + torch.arange(b * k).view(b, k)
    extra_keys[1], extra_keys[3, 1] = NO_TEXT, NO_TEXT
    extra_keys[2, 1], extra[2, 1] = extra_keys[0, 0], extra[0, 0]
    extra_keys[3, 0], extra[3, 0] = keys[1, 0], passages[1, 0]
    keys[3, 1], passages[3, 1] = extra_keys[0, 1], extra[0, 1]
    query_keys = torch.tensor([5, 6, 5, 7])
    return Representations(
        queries, passages, keys, query_keys=query_keys, extra_positives=extra, extra_positive_keys=extra_keys
    )


def by_loops(reps: Representations, tau: float, in_batch: bool = True, both_ways: bool = False) -> float:
    """Each text is a pair of its key and its place, (owner, column); columns from C on are extra positives."""
    b, c, _ = reps.passages.shape
    texts = torch.cat([reps.passages, reps.extra_positives], 1)
    keys = torch.cat([reps.passage_keys, reps.extra_positive_keys], 1).tolist()
    of_row = [{keys[i][0], *keys[i][c:]} - {NO_TEXT} for i in range(b)]
    total = 0.0
    for i in range(b):
        known = set().union(*(of_row[j] for j in range(b) if reps.query_keys[j] == reps.query_keys[i]))
        scores = {
            (j, n): math.exp(reps.queries[i] @ texts[j, n] / tau)
            for j in range(b)
            for n in range(texts.shape[1])
            if keys[j][n] != NO_TEXT
        }
        numerator = sum(next(s for (j, n), s in scores.items() if keys[j][n] == key) for key in known)
        others = sum(s for (j, n), s in scores.items() if keys[j][n] not in known and (in_batch or j == i))
        found = -math.log(numerator / (numerator + others))
        if both_ways:
            first = keys[i][0]
            back = {j: math.exp(reps.queries[j] @ texts[i, 0] / tau) for j in range(b)}
            wrong = [j for j in range(b) if first not in of_row[j] and reps.query_keys[j] != reps.query_keys[i]]
            found = (found - math.log(back[i] / (back[i] + sum(back[j] for j in wrong)))) / 2
        total += found / b
    return total


def test_by_hand():
    """−ln((e + 1) / (e + 1 + e^−1)): cosines 1 and 0 of the two positives and −1 of the negative, τ = 1."""
    one_negative = unit(0, math.pi)[None]
    reps = Representations(
        unit(0),
        one_negative,
        torch.tensor([[1, 2]]),
        extra_positives=unit(math.pi / 2)[None],
        extra_positive_keys=torch.tensor([[3]]),
    )
    loss = InfoNCE(1.0, positives="all")
    assert loss(reps).item() == pytest.approx(-math.log((math.e + 1) / (math.e + 1 + math.exp(-1))), abs=1e-12)
    lacking = replace(reps, extra_positive_keys=torch.tensor([[NO_TEXT]]))
    assert loss(lacking).item() == pytest.approx(-math.log(math.e / (math.e + math.exp(-1))), abs=1e-12)


def test_an_extra_positive_is_a_negative_of_other_queries():
    """Two queries with cosines 1 to their own texts and −1 to the other's: −ln(2e / (2e + n e^−1)) with n = 2 texts of
    the other query, or 1 where that has no second positive."""
    reps = Representations(
        unit(0, math.pi),
        unit(0, math.pi)[:, None],
        torch.tensor([[1], [2]]),
        extra_positives=unit(0, math.pi)[:, None],
        extra_positive_keys=torch.tensor([[3], [4]]),
    )
    loss = InfoNCE(1.0, positives="all")
    up, down = math.e, math.exp(-1)
    assert loss(reps).item() == pytest.approx(-math.log(2 * up / (2 * up + 2 * down)), abs=1e-12)
    ragged = replace(reps, extra_positive_keys=torch.tensor([[3], [NO_TEXT]]))
    expected = -(math.log(2 * up / (2 * up + down)) + math.log(up / (up + 2 * down))) / 2
    assert loss(ragged).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("both_ways", [False, True])
def test_against_loops(both_ways):
    reps = random_reps()
    loss = InfoNCE(0.2, positives="all", bidirectional=both_ways)
    assert loss(reps).item() == pytest.approx(by_loops(reps, 0.2, both_ways=both_ways), abs=1e-12)
    one = replace(reps, extra_positives=None, extra_positive_keys=None)
    assert abs(loss(reps) - loss(one)) > 1e-3
    assert InfoNCE(0.2, bidirectional=both_ways)(reps) == InfoNCE(0.2, bidirectional=both_ways)(one)


def test_without_in_batch_negatives_only_own_texts_count():
    reps = replace(random_reps(), query_keys=torch.arange(4))
    loss = InfoNCE(0.2, in_batch_negatives=False, positives="all")
    assert loss(reps).item() == pytest.approx(by_loops(reps, 0.2, in_batch=False), abs=1e-12)
    isolated = replace(reps, isolated=torch.ones(4, dtype=torch.bool))
    assert InfoNCE(0.2, positives="all")(isolated).item() == pytest.approx(loss(reps).item(), abs=1e-12)
    assert abs(loss(reps) - InfoNCE(0.2, positives="all")(reps)) > 1e-2


@pytest.mark.parametrize("both_ways", [False, True])
def test_what_stands_in_for_a_missing_positive_gets_no_gradient_and_has_no_effect(both_ways):
    reps = random_reps().as_leaves()
    loss = InfoNCE(0.2, positives="all", bidirectional=both_ways)
    value = loss(reps)
    value.backward()
    missing = reps.extra_positive_keys == NO_TEXT
    assert missing.sum() == 3
    assert not reps.extra_positives.grad[missing].any()
    assert reps.extra_positives.grad[0].abs().amax(1).min() > 1e-4
    changed = reps.extra_positives.detach().clone()
    changed[missing] = 3.0
    assert loss(replace(reps, extra_positives=changed)).item() == value.item()


def test_of_a_text_that_stands_twice_the_rows_own_is_pulled():
    """With dropout the two have different embeddings, and without in-batch negatives the other is not the row's."""
    reps = random_reps().as_leaves()
    assert reps.passage_keys[3, 1] == reps.extra_positive_keys[0, 1]
    InfoNCE(0.2, positives="all").per_query(reps, torch.zeros(4, dtype=torch.long), [4])[0].backward()
    assert reps.extra_positives.grad[0].abs().amax(1).min() > 1e-4
    assert not reps.passages.grad[3, 1].any()
    assert reps.passages.grad[3, 0].any()


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"false_negatives": FalseNegatives(0.05)}])
def test_gradient(options):
    reps = random_reps(d=3)
    loss = InfoNCE(0.3, positives="all", **options)
    leaves = [part.clone().requires_grad_() for part in reps.embeddings]
    assert torch.autograd.gradcheck(
        lambda q, p, e: loss(replace(reps, queries=q, passages=p, extra_positives=e)), leaves
    )


def test_matryoshka_truncates_extra_positives_too():
    reps, term = random_reps(), InfoNCE(0.2, positives="all")
    by_hand = [
        replace(
            reps,
            queries=truncated(reps.queries, m),
            passages=truncated(reps.passages, m),
            extra_positives=truncated(reps.extra_positives, m),
        )
        for m in (6, 4)
    ]
    expected = term(by_hand[0]) + 0.5 * term(by_hand[1])
    found = Matryoshka(InfoNCE(0.2, positives="all"), [4], [0.5])
    assert found(reps).item() == pytest.approx(expected.item(), abs=1e-12)
    assert abs(term(by_hand[0]) - term(by_hand[1])) > 1e-3
    assert found.uses_extra_positives
    assert found.metrics(reps)["positives_per_row"].item() == pytest.approx((3 + 1 + 3 + 2) / 4)


def test_a_guide_and_a_student_judge_extra_positives_of_other_queries():
    """Own texts are never left out, whatever they score; those of the other query are, above its first positive."""
    reps = Representations(
        unit(0, 3),
        unit(0.5, 3)[:, None],
        torch.tensor([[1], [2]]),
        extra_positives=unit(0.1, 0.2)[:, None],
        extra_positive_keys=torch.tensor([[3], [4]]),
    )
    rule = FalseNegatives(margin=0.0)
    s = {name: math.exp(math.cos(angle)) for name, angle in (("p", 0.5), ("e", 0.1), ("other", 3.0))}
    first = -math.log((s["p"] + s["e"]) / (s["p"] + s["e"] + s["other"]))  # the other's extra, 0.2, is above 0.5
    own, extra = math.exp(1), math.exp(math.cos(2.8))
    rest = math.exp(math.cos(2.5)) + math.exp(math.cos(2.9))
    second = -math.log((own + extra) / (own + extra + rest))
    loss = InfoNCE(1.0, positives="all", false_negatives=rule)
    assert loss(reps).item() == pytest.approx((first + second) / 2, abs=1e-12)
    assert loss.metrics(reps)["false_negative_share"].item() == pytest.approx((1 / 2 + 0) / 2)
    guided = InfoNCE(1.0, positives="all", false_negatives=FalseNegatives(margin=0.0, scores="guide"))
    guide = {"guide_queries": reps.queries, "guide_passages": reps.passages}
    with_guide = replace(reps, **guide, guide_extra_positives=reps.extra_positives)
    assert guided(with_guide).item() == pytest.approx(loss(reps).item(), abs=1e-12)
    elsewhere = replace(with_guide, guide_extra_positives=unit(3, 3)[:, None])
    assert abs(guided(elsewhere) - loss(reps)) > 1e-3


def test_known_positives_of_rows_with_several():
    rows = torch.tensor([[10, 20, NO_TEXT], [11, NO_TEXT, NO_TEXT], [12, 22, 32]])
    keys = torch.tensor([32, 99, 10, NO_TEXT, 22, 11, 20, 12, 10])
    known = known_positives(torch.arange(3), torch.tensor([5, 6, 5]), rows, keys)
    assert [set(keys[row].tolist()) for row in known] == [{10, 20, 12, 22, 32}, {11}, {10, 20, 12, 22, 32}]
    assert known.sum(1).tolist() == [6, 1, 6]  # 10 stands there twice
    alone = known_positives(torch.arange(1, 3), None, rows, keys)
    assert [set(keys[row].tolist()) for row in alone] == [{11}, {12, 22, 32}]
    assert not known_positives(torch.arange(3), None, rows, keys + 100).any()


def test_each_text_has_one_place():
    """The first that it has in the own row, or else the first of all."""
    keys = torch.tensor([7, 8, 7, 9, 8, 8, NO_TEXT, 9])
    known = torch.tensor([[True] * 6 + [False, True], [False] * 8])
    chosen = one_place_per_text(known, keys, torch.tensor([[2, 5, 4, 6]] * 2))[0]
    assert chosen.nonzero()[:, 0].tolist() == [2, 3, 5]
