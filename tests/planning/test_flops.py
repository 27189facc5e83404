"""FLOPs against numbers derived by hand, and against PyTorch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import Linear
from torch.utils.flop_counter import FlopCounterMode

from ullme.batch import Batch, GenerationRows
from ullme.engine.objective import Objective
from ullme.engine.presets import grl_terms
from ullme.losses import KTO, InfoNCE
from ullme.losses.false_negatives import FalseNegatives
from ullme.models.config import BackboneConfig
from ullme.models.loading import load_config
from ullme.planning.flops import ModelCost, StepWork, Work, embedding_work, generation_work, model_cost, step_work
from ullme.prompts import pad_rows

COST = ModelCost(
    linear=1000,
    adapter=10,
    head=500,
    attention_layers=2,
    attention_width=8,
    parameters=2000,
    trainable=10,
    full=False,
)
WORK = Work(tokens=7, pairs=25, targets=3)
ATTENTION = 4 * 2 * 8 * 25


def rows(lengths: list[int]):
    return pad_rows([[5] * n for n in lengths], 0)


@pytest.fixture
def batch():
    """Two queries of 3 and 2 tokens with two candidates each; prompts of 4 and 3 tokens."""
    return Batch(
        rows([3, 2]),
        rows([5, 4, 3, 2]),
        torch.arange(4).view(2, 2),
        torch.arange(2),
        GenerationRows(rows([4, 3]), rows([6, 5, 4, 1])),
    )


def test_forward_and_backward_by_hand():
    assert COST.forward(WORK) == 2 * 1010 * 7 + ATTENTION + 2 * 500 * 3
    assert COST.forward(WORK, adapters=False) == 2 * 1000 * 7 + ATTENTION + 2 * 500 * 3
    assert COST.backward(WORK) == 2 * (1000 + 20) * 7 + 2 * ATTENTION + 2 * 500 * 3
    full = replace(COST, full=True, adapter=0)
    assert full.backward(WORK) == 2 * full.forward(WORK)


def test_steps_by_hand():
    embed, learned = Work(10, 30), Work(20, 50, 12)
    scored, reference = Work(5, 10, 4), Work(20, 50, 12)
    work = StepWork(embed, learned, scored, reference)
    model = COST.forward(embed) + COST.backward(embed) + COST.forward(learned) + COST.backward(learned)
    model += COST.forward(scored)
    assert COST.step(work) == model
    bare = COST.hardware_step(work, first_forward=False, checkpointing=False, reference=False)
    assert bare == model
    assert COST.hardware_step(work, True, False, False) == bare + COST.forward(embed)
    layers_again = COST.forward(embed) + COST.forward(learned) - 2 * 500 * 12  # the head keeps what it needs
    assert COST.hardware_step(work, False, True, False) == bare + layers_again
    assert COST.hardware_step(work, False, False, True) == bare + COST.forward(reference, adapters=False)
    guided = replace(work, guide=embed)
    assert COST.step(guided) == model
    assert COST.hardware_step(guided, False, False, False) == bare + COST.forward(embed, adapters=False)


def test_work_of_embedding(batch):
    lengths = [3, 2, 5, 4, 3, 2]
    assert embedding_work(batch, causal=False) == Work(19, sum(n * n for n in lengths))
    assert embedding_work(batch, causal=True) == Work(19, sum(n * (n + 1) // 2 for n in lengths))


def test_work_of_generation(batch):
    every = torch.ones(2, 2, dtype=torch.bool)
    # alone: prompt + target without its last token, in a row of its own
    lengths = [4 + 5, 4 + 4, 3 + 3, 3 + 0]
    pairs = [n * (n + 1) // 2 for n in lengths]
    assert generation_work(batch, every, share_prompts=False) == Work(sum(lengths), sum(pairs), 16)
    # shared: each prompt once; every later token still looks at its whole prompt
    shared = sum(pairs) - 4 * 5 // 2 - 3 * 4 // 2
    assert generation_work(batch, every, share_prompts=True) == Work(sum(lengths) - 4 - 3, shared, 16)
    first = torch.tensor([[True, False], [False, False]])
    for share in (True, False):
        assert generation_work(batch, first, share) == Work(9, 45, 6)


def test_work_of_a_step_follows_the_terms(batch):
    every = generation_work(batch, torch.ones(2, 2, dtype=torch.bool), True)
    positive = generation_work(batch, torch.tensor([[True, False]] * 2), True)
    negative = generation_work(batch, torch.tensor([[False, True]] * 2), True)
    embed, nothing = embedding_work(batch, False), Work()

    def work(*args, **kwargs):
        return step_work(batch, Objective(grl_terms(*args, **kwargs)), causal=False, share_prompts=True)

    assert work(None, False) == StepWork(embed)
    assert work("dpo") == StepWork(
        embed, every, generation_work(batch, torch.zeros(2, 2, dtype=torch.bool), True), every
    )
    assert work("sft", False).learned == positive
    assert work("sft", False).reference == nothing
    detached = work("sft", detach_generation=True)
    assert (detached.learned, detached.scored) == (positive, negative)
    both = Objective([*grl_terms(None, False), KTO()])
    only = replace(batch, terms=("info_nce",))  # as of a dataset that names its terms
    assert step_work(only, both, causal=False, share_prompts=True) == StepWork(embed)
    guided = Objective([InfoNCE(false_negatives=FalseNegatives(margin=0.0, scores="guide"))])
    assert step_work(batch, guided, causal=False, share_prompts=True) == StepWork(embed, guide=embed)
    kto = [KTO(reference_pairs="first_negative"), KTO()]
    own, mismatched = (step_work(batch, Objective([term]), causal=False, share_prompts=True) for term in kto)
    assert own == StepWork(nothing, every, negative, every)
    assert mismatched == StepWork(nothing, every, positive, every + positive)


@pytest.fixture
def eager(make_model):
    """A padded eager model, whose every multiplication PyTorch's counter sees, and what ULLME counts for it."""

    def make(family: str, lora: bool):
        options = {"attn_implementation": "eager", "attention_path": "padded"}
        options |= {"lora_r": 4, "lora_dropout": 0.0} if lora else {"lora_name": None}
        model = make_model(family, **options).train()
        for module in model.modules():
            if isinstance(module, Linear):
                module.__class__ = Linear  # PEFT's own forward, which does W x and B A x apart and nothing twice
        return model, model_cost(load_config(model.options), model.options)

    return make


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_embedding_is_what_pytorch_counts(eager, family, lora):
    model, cost = eager(family, lora)
    ids = torch.randint(3, 300, (3, 10))
    work = Work(30, 3 * 100)
    with FlopCounterMode(display=False) as counter:
        rep = model(ids)["rep"]
    assert counter.get_total_flops() == cost.forward(work)
    with FlopCounterMode(display=False) as counter:
        rep.sum().backward()
    # nobody asks for the gradient of the frozen embedding, so layer 0 leaves out the one of its first multiplications
    names = ("c_attn",) if family == "gpt2" else ("q_proj", "k_proj", "v_proj")
    layer = model.causal_lm.base_model.h[0] if family == "gpt2" else model.causal_lm.base_model.layers[0]
    saved = 0
    if lora:
        first = [m for n, m in layer.named_modules() if n.split(".")[-1] in names]
        saved = sum(m.base_layer.weight.numel() + m.lora_A["ullme"].weight.numel() for m in first)
    assert counter.get_total_flops() == cost.backward(work) - 2 * saved * 30


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_likelihood_is_what_pytorch_counts(eager, family):
    model, cost = eager(family, True)
    prompts, targets = rows([4, 4]), rows([7, 7, 7, 7])
    batch = Batch(prompts, targets, torch.arange(4).view(2, 2), torch.arange(2), GenerationRows(prompts, targets))
    work = generation_work(batch, torch.ones(2, 2, dtype=torch.bool), share_prompts=False)
    assert work == Work(4 * 10, 4 * 55, 4 * 7)
    owner = torch.tensor([0, 0, 1, 1])
    model(prompts.input_ids, prompts.attention_mask, True, targets, owner)  # the head is checked once
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(prompts.input_ids, prompts.attention_mask, True, targets, owner)
    whole = replace(work, pairs=4 * 100)  # eager attention multiplies what the causal mask hides as well
    assert counter.get_total_flops() == cost.forward(whole)


def test_experts_count_by_their_active_share(llm_folder):
    folder = llm_folder("mixtral", num_local_experts=4, num_experts_per_tok=1)
    options = BackboneConfig(folder, lora_name=None)
    cost = model_cost(load_config(options), options)
    attention, router, expert = 32 * 32 * 2 + 32 * 16 * 2, 32 * 4, 3 * 32 * 64
    assert cost.linear == 2 * (attention + router + expert)
