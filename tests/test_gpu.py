"""What only a CUDA device can show: the varlen kernel, half precision, memory. Needs torch, transformers, peft, pytest."""

from __future__ import annotations

import pytest
import torch
from test_gradcache import assert_same_gradients, gradients, make_batch
from test_objective import with_generation
from tiny import make_llm, recomputes_layers

from ullme.engine.gradcache import chunk_slices
from ullme.engine.objective import Objective
from ullme.engine.scoring import score
from ullme.losses import DPO, KL, InfoNCE
from ullme.models import attention, likelihood
from ullme.models.attention import packing
from ullme.prompts import pad_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def ragged(rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 90, (rows,), generator=generator).tolist()
    block = pad_rows([torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths], 0)
    return block.input_ids.cuda(), block.attention_mask.cuda()


@pytest.mark.parametrize("family", ["llama", "mistral", "phi", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 7])
def test_the_packed_kernel_equals_the_padded_forward_in_bfloat16(family, causal, window):
    if window and family not in ("mistral", "gemma2"):
        pytest.skip("the family has no sliding window")
    sizes = {"head_dim": 16, "hidden_size": 64, "max_position_embeddings": 256}
    model = make_llm(family, **sizes, **({"sliding_window": window} if window else {})).cuda().bfloat16()
    packing.install(model)
    ids, mask = ragged()
    with torch.no_grad():
        packed = attention.run_packed(model.base_model, ids, mask, causal).flat.float()
        padded = attention.run_padded(model.base_model, ids, mask, causal).flat.float()
        exact = attention.run_padded(model.float().base_model, ids, mask, causal).flat.float()
    assert (exact - padded).abs().max() > 0
    # both are bfloat16; the packed one may not be further from float32 than twice the padded one
    assert (packed - exact).abs().mean() <= 2 * (padded - exact).abs().mean()


def test_the_varlen_kernel_is_what_runs(monkeypatch):
    calls = []
    kernel = packing._varlen_attention
    monkeypatch.setattr(packing, "_varlen_attention", lambda *a: calls.append(1) or kernel(*a))
    model = make_llm("llama", head_dim=16, hidden_size=64).cuda().bfloat16()
    packing.install(model)
    with torch.no_grad():
        attention.run_packed(model.base_model, *ragged(), False)
    assert len(calls) == 2


@pytest.fixture
def model(make_model):
    return make_model(sizes={"head_dim": 16, "hidden_size": 64, "max_position_embeddings": 256}).cuda().train()


def test_gradcache_equals_the_full_batch_and_shared_prompts_change_nothing(model):
    batch = with_generation(make_batch()).to("cuda")
    runs = {}
    for share in (True, False):
        objective = Objective([InfoNCE(), DPO(), KL()], share_prompts=share)
        objective.full_batch(model, batch)
        runs["full", share] = gradients(model)
        objective.grad_cache(model, batch, chunk_slices(batch, 2, None))
        runs["chunks", share] = gradients(model)
    for found in runs.values():
        assert_same_gradients(found, runs["full", False], 1e-3)  # float32, TF32 off


def test_gradcache_under_bfloat16_autocast(model):
    """On the varlen kernel, with prompts shared and apart: the same direction as float32."""
    batch = with_generation(make_batch()).to("cuda")
    Objective([InfoNCE(), DPO(), KL()]).full_batch(model, batch)
    exact = torch.cat([g.flatten() for g in gradients(model).values()])
    for share in (True, False):
        with torch.autocast("cuda", torch.bfloat16):
            objective = Objective([InfoNCE(), DPO(), KL()], share_prompts=share)
            objective.grad_cache(model, batch, chunk_slices(batch, 2, None))
        found = torch.cat([g.flatten() for g in gradients(model).values()])
        assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.99


def test_likelihoods_in_blocks_equal_the_direct_ones(model, monkeypatch):
    """Whole logits of each row alone, beside packed rows, shared prompts and blocks of 64 tokens; with gradient."""
    batch = with_generation(make_batch()).to("cuda")
    prompts, targets = batch.generation.prompts, batch.generation.targets
    direct = []
    for n in range(len(targets)):
        front = prompts.input_ids[n // 3][prompts.attention_mask[n // 3].bool()]
        target = targets.input_ids[n][targets.attention_mask[n].bool()]
        logits = model.causal_lm(input_ids=torch.cat([front, target])[None]).logits[0, len(front) - 1 : -1]
        direct.append(logits.log_softmax(-1).gather(1, target[:, None]).sum())
    direct = torch.stack(direct).view(5, 3)
    direct.pow(2).sum().backward()
    expected = gradients(model)
    monkeypatch.setitem(likelihood._BLOCK_LOGITS, "cuda", 1)
    found, _ = score(model, batch, torch.ones(5, 3, dtype=torch.bool, device="cuda"), True)
    torch.testing.assert_close(found, direct, rtol=1e-4, atol=0)  # float32, TF32 off
    found.pow(2).sum().backward()
    assert_same_gradients(gradients(model), expected, 1e-3)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        half, _ = score(model, batch, torch.ones(5, 3, dtype=torch.bool, device="cuda"), True)
    assert half.dtype is torch.float32
    torch.testing.assert_close(half, direct, rtol=2e-2, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_layers_change_no_gradient(make_model, dropout):
    sizes, batch = {"head_dim": 16, "hidden_size": 64}, with_generation(make_batch()).to("cuda")
    found = {}
    for checkpointing in (False, True):
        model = make_model(sizes=sizes, lora_dropout=dropout, gradient_checkpointing=checkpointing).cuda().train()
        assert recomputes_layers(model) is checkpointing
        torch.manual_seed(0)
        Objective([InfoNCE(), DPO(), KL()]).grad_cache(model, batch, chunk_slices(batch, 2, None))
        found[checkpointing] = gradients(model)
    assert_same_gradients(found[True], found[False], 1e-3)  # float32, TF32 off


def test_dropout_is_replayed_on_the_device(make_model):
    sizes = {"head_dim": 16, "hidden_size": 64}
    model = make_model(sizes=sizes, lora_dropout=0.3).cuda().train()
    batch, seen = make_batch().to("cuda"), []
    forward = model.forward
    model.forward = lambda *a, **k: seen.append(forward(*a, **k)) or seen[-1]
    Objective([InfoNCE()]).grad_cache(model, batch, chunk_slices(batch, 2, None))
    for first, second in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(first["rep"], second["rep"], rtol=0, atol=1e-6)


def test_memory_is_flat_in_the_batch(model):
    peaks = []
    for b in (16, 64):
        batch = make_batch(b, 9).to("cuda")
        Objective([InfoNCE()]).grad_cache(model, batch, chunk_slices(batch, 4, None))
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        Objective([InfoNCE()]).grad_cache(model, batch, chunk_slices(batch, 4, None))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 1.5 * peaks[0]
