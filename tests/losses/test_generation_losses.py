"""SFT, preference losses and KL against values worked out by hand, finite differences, and their invariances."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import blank_batch

from ullme.batch import Representations
from ullme.losses import CPO, DPO, IPO, KL, KTO, SFT, Chunk, Hinge, PseudoLabelInfoNCE, SimPO, kl_loss, sft_loss
from ullme.losses.preference import dpo_loss, hinge_loss, ipo_loss, kto_loss, random_negative, simpo_loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.double)


def chunk(b: int = 3, c: int = 4, seed: int = 0) -> Chunk:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.double, generator=generator)

    def unit(*shape):
        return torch.nn.functional.normalize(normal(*shape), dim=-1)

    keys = torch.arange(b * c).view(b, c) * 7 + 3
    return Chunk(
        blank_batch(keys, torch.arange(b) + 11),
        reps=Representations(unit(b, 5), unit(b, c, 5), keys),
        policy_logps=-20 + 5 * normal(b, c),
        reference_logps=-20 + 5 * normal(b, c),
        lengths=torch.randint(3, 9, (b, c), generator=generator),
        statistics={"kto": torch.tensor(0.7, dtype=torch.double)},
    )


def test_sft_by_hand():
    torch.testing.assert_close(sft_loss(tensor(-6.0, -10.0), torch.tensor([3, 4])), tensor(2.0, 2.5))


def test_dpo_by_hand():
    """r⁺ = 2, r⁻ = (−1, 3), β = 0.5: the mean of −ln σ(1.5) and −ln σ(−0.5)."""
    expected = (-math.log(sigmoid(1.5)) - math.log(sigmoid(-0.5))) / 2
    torch.testing.assert_close(dpo_loss(tensor(2.0), tensor([-1.0, 3.0]), 0.5), tensor(expected))


def test_dpo_begins_at_ln_2():
    c = chunk()
    equal = replace(c, reference_logps=c.policy_logps)
    torch.testing.assert_close(DPO()(equal), tensor(*[math.log(2)] * 3))


def test_ipo_and_hinge_by_hand():
    torch.testing.assert_close(ipo_loss(tensor(2.0), tensor([-1.0, 3.0]), 0.5), tensor((4 + 4) / 2))
    torch.testing.assert_close(hinge_loss(tensor(2.0), tensor([-1.0, 3.0]), 0.5), tensor((0 + 1.5) / 2))


def test_kto_by_hand():
    found = kto_loss(tensor(2.0), tensor([-1.0, 3.0]), torch.tensor(0.5).double(), 0.5, 1.5, 0.8)
    chosen = 1.5 * (1 - sigmoid(0.5 * 1.5))
    rejected = 0.8 * ((1 - sigmoid(0.5 * 1.5)) + (1 - sigmoid(0.5 * -2.5))) / 2
    torch.testing.assert_close(found, tensor((chosen + rejected) / 2))
    policy, point = tensor([2.0, -1.0, 3.0]), {"kto": torch.tensor(0.5, dtype=torch.double)}
    keys = torch.arange(3)[None]
    c = Chunk(blank_batch(keys), None, policy, torch.zeros_like(policy), torch.ones(1, 3), point)
    torch.testing.assert_close(KTO(0.5, desirable_weight=1.5, undesirable_weight=0.8)(c), found)


def test_ktos_statistic_is_the_ratio_of_its_pair():
    """r = (1, −1, 3); the first candidate has two tokens, the first negative four."""
    policy, reference = tensor([-5.0, -9.0, -4.0]), tensor([-6.0, -8.0, -7.0])
    lengths, keys = torch.tensor([[2, 4, 5]]), torch.arange(3)[None]
    c = Chunk(blank_batch(keys), None, policy, reference, lengths)
    for pairs, ratio, normalized in (("first_negative", -1.0, -0.25), ("mismatched", 1.0, 0.5)):
        torch.testing.assert_close(KTO(reference_pairs=pairs).statistic(c), tensor(ratio))
        found = KTO(length_normalized=True, reference_pairs=pairs).statistic(c)
        torch.testing.assert_close(found, tensor(normalized))


def test_kto_reference_point_is_never_negative():
    c = chunk()
    values = []
    for point in (-3.0, 0.0, 2.0):
        statistics = {"kto": torch.tensor(point, dtype=torch.double)}
        values.append(KTO()(replace(c, statistics=statistics)))
    torch.testing.assert_close(values[0], values[1])
    assert (values[2] - values[1]).abs().max() > 1e-3


def test_cpo_and_simpo_by_hand():
    policy, lengths = tensor([-6.0, -8.0]), torch.tensor([[3, 5]])
    c = Chunk(blank_batch(torch.tensor([[1, 2]])), None, policy, None, lengths)
    torch.testing.assert_close(CPO(0.5, nll_weight=0.25)(c), tensor(-math.log(sigmoid(1.0)) + 0.25 * 2))
    torch.testing.assert_close(SimPO(2.0, gamma=0.5)(c), tensor(-math.log(sigmoid(2 * (-2 + 1.6) - 0.5))))
    torch.testing.assert_close(simpo_loss(tensor(-2.0), tensor([-4.0]), 2.0, 0.5), tensor(-math.log(sigmoid(3.5))))


def test_kl_by_hand_and_its_direction():
    """P = (3/4, 1/4), Q = (1/2, 1/2)."""
    p, q = tensor([math.log(3.0), 0.0]), tensor([5.0, 5.0])
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    torch.testing.assert_close(kl_loss(p, q), tensor(forward))
    torch.testing.assert_close(kl_loss(p, q, "generation_to_retrieval"), tensor(backward))
    assert forward != pytest.approx(backward, abs=1e-2)


def test_kl_uses_cosines_and_mean_token_likelihoods():
    c = chunk()
    cosines = torch.stack([c.reps.passages[n] @ c.reps.queries[n] for n in range(3)])
    expected = kl_loss(cosines / 0.1, c.policy_logps / c.lengths / 0.5)
    torch.testing.assert_close(KL(retrieval_temperature=0.1, generation_temperature=0.5)(c), expected)


def test_kl_of_half_precision_under_autocast_is_float32():
    """Cosines in bfloat16 over a temperature of 0.02 would be wrong by tenths."""
    c, kl = chunk(b=8, c=6), KL(retrieval_temperature=0.02)
    exact = kl(c)
    reps = Representations(c.reps.queries.float(), c.reps.passages.float(), c.passage_keys)
    with torch.autocast("cpu", torch.bfloat16):
        found = kl(replace(c, reps=reps, policy_logps=c.policy_logps.float()))
        rounded = torch.einsum("bd,bcd->bc", reps.queries, reps.passages)
    assert rounded.dtype == torch.bfloat16  # what autocast would do
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        SFT(),
        DPO(),
        DPO(negatives="first"),
        DPO(negatives="random"),
        DPO(length_normalized=True),
        IPO(),
        Hinge(0.05),
        KTO(),
        CPO(),
        SimPO(),
        KL(),
        KL("generation_to_retrieval", 0.2, 2.0),
    ],
    ids=lambda loss: f"{loss.name}-{getattr(loss, 'negatives', '')}",
)
def test_gradient_is_the_finite_difference(loss):
    c = chunk()

    def total(logps, queries, passages):
        reps = Representations(queries, passages, c.passage_keys)
        return loss(replace(c, reps=reps, policy_logps=logps)).sum()

    inputs = [x.clone().requires_grad_() for x in (c.policy_logps, c.reps.queries, c.reps.passages)]
    total(*inputs).backward()
    assert inputs[0].grad.abs().max() > 1e-4
    assert torch.autograd.gradcheck(total, inputs)
    # it looks at exactly the candidates that it declares
    wanted, learned = loss.candidates(c.batch)
    assert not inputs[0].grad[~learned].any()
    assert (wanted | ~learned).all()


def test_detached_kl_teaches_the_embedding_only():
    c = chunk()
    logps = c.policy_logps.clone().requires_grad_()
    queries = c.reps.queries.clone().requires_grad_()
    reps = Representations(queries, c.reps.passages, c.passage_keys)
    kl = KL(detach_generation=True)
    kl(Chunk(c.batch, reps, logps, None, c.lengths)).sum().backward()
    assert logps.grad is None
    assert queries.grad.abs().max() > 1e-4
    assert not kl.candidates(c.batch)[1].any()


def test_a_random_negative_belongs_to_the_row_and_varies():
    keys = torch.randint(0, 2**62, (500, 9), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(500)
    choice = random_negative(rows, keys)
    assert set(choice.tolist()) == set(range(1, 9))
    torch.testing.assert_close(random_negative(rows[200:], keys[200:]), choice[200:])
    other_epoch = random_negative(rows, keys.roll(1, 0))  # the same rows with other candidates
    assert 300 < (other_epoch != choice).sum() < 500  # about 7 of 8


def test_metrics():
    policy, reference = tensor([-5.0, -9.0, -4.0]), tensor([-6.0, -8.0, -6.0])
    c = Chunk(blank_batch(torch.arange(3)[None]), None, policy, reference, torch.ones(1, 3))
    metrics = DPO(0.5).metrics(c)  # r⁺ = 1, r⁻ = (−1, 2)
    torch.testing.assert_close(metrics["reward_margin"], tensor(0.5 * (1 - 0.5)))
    torch.testing.assert_close(metrics["reward_accuracy"], tensor(0.5))
    queries, passages = tensor([1.0, 0.0]), tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    reps = Representations(queries, passages, c.passage_keys)
    for logps, agreement in (([-1.0, -2.0, -3.0], 1.0), ([-3.0, -2.0, -1.0], -1.0)):
        c = Chunk(c.batch, reps, tensor(logps), None, torch.ones(1, 3))
        assert KL().metrics(c)["rank_agreement"].item() == pytest.approx(agreement, abs=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(beta=0), "DPO.beta=0"),
        (lambda: KTO(negatives="some"), "KTO.negatives='some'"),
        (lambda: KTO(reference_pairs="own"), "KTO.reference_pairs='own': choose mismatched or first_negative"),
        (lambda: KL(retrieval_temperature=0), "KL.retrieval_temperature=0"),
        (lambda: KL(generation_temperature=math.inf), "KL.generation_temperature=inf: must be above 0, and finite"),
        (lambda: PseudoLabelInfoNCE(margin=math.nan), "PseudoLabelInfoNCE.margin=nan: must be a number of 0 or more"),
        (lambda: KL(direction="both"), "KL.direction='both'"),
        (lambda: SFT(weight=-1), "SFT.weight=-1"),
        (lambda: SFT(weight=math.nan), "SFT.weight=nan: must be a number of 0 or more"),
        (lambda: KTO(undesirable_weight=-1), "KTO.undesirable_weight=-1"),
        (lambda: CPO(nll_weight=-1), "CPO.nll_weight=-1"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
