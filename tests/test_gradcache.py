"""GradCache against the whole batch at once: the loss and every gradient, for any chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ullme.batch import NO_TEXT, Batch
from ullme.engine.gradcache import GradCache, backward_outside_autocast, chunk_slices, embed_batch, microbatch_rows
from ullme.losses import InfoNCE
from ullme.prompts import pad_rows
from ullme.token_rows import TokenRows

B, C = 5, 3


def make_batch(b: int = B, c: int = C) -> Batch:
    generator = torch.Generator().manual_seed(3)

    def rows(n: int, longest: int) -> TokenRows:
        lengths = torch.randint(2, longest, (n,), generator=generator).tolist()
        return pad_rows([torch.randint(3, 300, (k,), generator=generator).tolist() for k in lengths], 0)

    return Batch(rows(b, 6), rows(b * c, 15), torch.arange(b * c).view(b, c), torch.arange(b))


def with_extra_positives(batch: Batch, k: int = 2) -> Batch:
    """Two more positives of each query, which row 1 lacks both and row 3 the last of."""
    keys = 1000 + torch.arange(len(batch) * k).view(-1, k)
    keys[1], keys[3, -1] = NO_TEXT, NO_TEXT
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 300, (n % 5 + 1,), generator=generator).tolist() for n in range(keys.numel())]
    return replace(batch, extra_positives=pad_rows(rows, 0), extra_positive_keys=keys)


def embedder(model):
    return lambda rows: model(rows.input_ids, rows.attention_mask)["rep"]


def gradients(model) -> dict[str, torch.Tensor]:
    out = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert out
    model.zero_grad()
    return out


def assert_same_gradients(found: dict, expected: dict, rel: float) -> None:
    scale = max(g.abs().max().item() for g in expected.values())
    assert scale > 1e-3, "a comparison of zeros proves nothing"
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max().item() <= rel * scale, name


@pytest.fixture
def model(make_model):
    return make_model(lora_dropout=0.0).double().train()


@pytest.mark.parametrize("lora_name", ["ullme", None])
@pytest.mark.parametrize("slices", [1, 2, 3, B, 99, "tokens"])
def test_every_gradient_equals_the_full_batchs(make_model, lora_name, slices):
    model = make_model(lora_name=lora_name).double().train()
    batch, loss = make_batch(), InfoNCE(0.05)
    full = loss(embed_batch(embedder(model), batch))
    full.backward()
    expected = gradients(model)
    chunks = chunk_slices(batch, None, 60) if slices == "tokens" else chunk_slices(batch, slices, None)
    assert len(chunks) > 1 or slices in (B, 99)
    values = []
    GradCache(embedder(model), lambda reps: values.append(loss(reps)) or values[0]).step(batch, chunks)
    assert [v.item() for v in values] == [pytest.approx(full.item(), rel=1e-12)]
    assert_same_gradients(gradients(model), expected, 1e-10)


def test_chunks_matter_to_the_loss_itself(model):
    """The mean over chunks of each chunk's own loss is another number: in-batch negatives cross chunks."""
    batch, loss = make_batch(), InfoNCE(0.05)
    with torch.no_grad():
        whole = loss(embed_batch(embedder(model), batch)).item()
        parts = [loss(embed_batch(embedder(model), batch[n : n + 1])).item() for n in range(B)]
    assert abs(whole - sum(parts) / B) > 1e-2


def test_replay_reproduces_dropout_exactly(make_model):
    model = make_model(lora_dropout=0.3).double().train()
    batch = make_batch()
    seen: list[torch.Tensor] = []

    def embed(rows: TokenRows) -> torch.Tensor:
        rep = embedder(model)(rows)
        seen.append(rep.detach().clone())
        return rep

    GradCache(embed, InfoNCE()).step(batch, chunk_slices(batch, 2, None))
    first, second = seen[:3], seen[3:]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    again = embed_batch(embedder(model), batch[:2])
    assert (again.queries - first[0][:2]).abs().max() > 1e-3  # dropout was on, and the state moved on


@pytest.mark.parametrize("held", [1, 3])
def test_held_graphs_change_nothing_and_are_not_embedded_again(make_model, held):
    """With dropout: a held chunk has the random numbers that its first forward drew."""
    model = make_model(lora_dropout=0.3).double().train()
    batch, calls, found = make_batch(), [], []

    def embed(rows: TokenRows) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return embedder(model)(rows)

    for count in (0, held):
        torch.manual_seed(1)
        GradCache(embed, InfoNCE()).step(batch, chunk_slices(batch, 2, None), num_retained=count)
        found.append(gradients(model))
    assert calls == [False] * 3 + [True] * 3 + [True] * held + [False] * (3 - held) + [True] * (3 - held)
    assert_same_gradients(found[1], found[0], 1e-10)


def test_gradient_with_dropout_is_that_of_the_loss_it_reports(make_model):
    """Finite difference along one direction, with the random state of the step restored."""
    model = make_model("gpt2", lora_dropout=0.3).double().train()  # Llama's norm would round to float32
    batch, loss = make_batch(), InfoNCE(0.1)
    slices = chunk_slices(batch, 2, None)

    def step() -> float:
        torch.manual_seed(5)
        values = []
        GradCache(embedder(model), lambda reps: values.append(loss(reps)) or values[0]).step(batch, slices)
        step.gradients = gradients(model)
        return values[0].item()

    step()
    parameter = next(p for n, p in model.named_parameters() if "lora_B" in n)
    name = next(n for n, p in model.named_parameters() if p is parameter)
    gradient = step.gradients[name]
    direction = gradient / gradient.norm()
    values = []
    for sign in (1, -1):
        parameter.data.add_(direction, alpha=sign * 1e-5)
        values.append(step())
        parameter.data.sub_(direction, alpha=sign * 1e-5)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient.norm().item(), rel=1e-6)


def test_works_under_autocast(make_model):
    """Autocast keeps copies of weights made without gradient; they must not be used for the replay."""
    model, batch, loss = make_model().train(), make_batch(), InfoNCE(0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss(embed_batch(embedder(model), batch)).backward()
        expected = gradients(model)
        GradCache(embedder(model), loss).step(batch, chunk_slices(batch, 2, None))
    found = gradients(model)
    assert_same_gradients(found, expected, 0.1)
    cosine = torch.nn.functional.cosine_similarity(
        torch.cat([g.flatten() for g in found.values()]), torch.cat([g.flatten() for g in expected.values()]), dim=0
    )
    assert cosine > 0.99


def near(b: int = 6, c: int = 3, width: int = 32) -> torch.Tensor:
    """(b + b c, width) unit vectors with cosines of about 0.99, as an untrained LLM gives them."""
    noise = torch.randn(b + b * c, width, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(noise + 8, dim=-1).requires_grad_()


@pytest.mark.parametrize("cached", [True, False])
def test_the_gradient_of_the_similarities_stays_in_float32_under_autocast(cached):
    """Autocast would compute the gradients of float32 products in bfloat16, though the products were not."""
    table, batch, loss = near(), make_batch(6, 3), InfoNCE(0.05)

    def step() -> torch.Tensor:
        table.grad = None
        if cached:
            rows = iter([table, table])  # embedded twice
            GradCache(lambda _: next(rows), loss).step(batch, chunk_slices(batch, None, None))
        else:
            backward_outside_autocast(torch.Tensor.backward)(loss(embed_batch(lambda _: table, batch)))
        return table.grad.clone()

    expected = step()
    with torch.autocast("cpu", torch.bfloat16):
        found = step()
        table.grad = None
        loss(embed_batch(lambda _: table, batch)).backward()
    assert (table.grad - expected).abs().max() > 1e-3 * expected.abs().max(), "autocast would change it"
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_checkpointing_and_chunks_together(make_model):
    expected, found = [], []
    for checkpointing, out in ((False, expected), (True, found)):
        model = make_model(gradient_checkpointing=checkpointing, lora_dropout=0.2).double().train()
        batch = make_batch()
        torch.manual_seed(1)
        GradCache(embedder(model), InfoNCE()).step(batch, chunk_slices(batch, 2, None))
        out.append(gradients(model))
    assert_same_gradients(found[0], expected[0], 1e-10)


def test_gradients_are_synchronised_with_the_last_chunk_only(model):
    from contextlib import contextmanager

    events = []

    @contextmanager
    def no_sync():
        events.append("no_sync")
        yield

    batch = make_batch()
    GradCache(embedder(model), InfoNCE(), no_sync=no_sync).step(batch, chunk_slices(batch, 2, None))
    assert events == ["no_sync"] * 2  # three pieces
    events.clear()

    def chunk_loss(chunk, reps, scale):
        parameter = next(p for p in model.parameters() if p.requires_grad)
        return scale * (parameter.sum() if reps is None else reps.queries.sum())

    chunks = chunk_slices(batch, 2, None)
    GradCache(embedder(model), InfoNCE(), chunk_loss, no_sync=no_sync).step(batch, chunks)
    assert events == ["no_sync"] * 5  # of three chunks and three microbatches, the last of these alone synchronises
    events.clear()
    GradCache(None, None, chunk_loss, no_sync=no_sync).step(batch, chunks)
    assert events == ["no_sync"] * 2


def test_random_numbers_go_on_after_the_chunk_losses(model):
    """Not where the last microbatch left off: the next step would draw the chunk losses' numbers once more."""
    states = []

    def chunk_loss(chunk, reps, scale):
        drawn = torch.rand(())
        states.append(torch.get_rng_state())
        return scale * drawn * reps.queries.sum()

    GradCache(embedder(model), InfoNCE(), chunk_loss).step(make_batch(), chunk_slices(make_batch(), 2, None))
    assert not torch.equal(states[0], states[-1])
    assert torch.equal(torch.get_rng_state(), states[-1])


def test_memory_does_not_hold_the_batch(model):
    """Tensors kept for backward: never more than those of one chunk, however many chunks there are."""
    import weakref

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def most_kept(batch: Batch, slices: list[slice]) -> int:
        alive: weakref.WeakSet[Kept] = weakref.WeakSet()
        most = 0

        def pack(tensor: torch.Tensor) -> Kept:
            nonlocal most
            kept = Kept(tensor)
            alive.add(kept)
            most = max(most, len(alive))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            GradCache(embedder(model), InfoNCE()).step(batch, slices)
        return most

    batch = make_batch()
    one = most_kept(batch[:1], [slice(0, 1)])
    assert one > 100
    assert most_kept(batch, chunk_slices(batch, 1, None)) <= 1.2 * one  # rows of one chunk differ in their groups


def test_chunk_slices():
    batch = make_batch()
    assert chunk_slices(batch, 2, None) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert chunk_slices(batch, 99, None) == [slice(0, 5)]
    tokens = [batch[n : n + 1].num_tokens for n in range(B)]
    slices = chunk_slices(batch, None, 60)
    assert [n for s in slices for n in range(s.start, s.stop)] == list(range(B))
    assert all(sum(tokens[s]) <= 60 for s in slices)
    assert chunk_slices(batch, None, 1) == [slice(n, n + 1) for n in range(B)]  # one that is too long stands alone
    assert chunk_slices(batch, None, sum(tokens)) == [slice(0, B)]  # a chunk may have exactly as many
    assert chunk_slices(batch, None, sum(tokens) - 1) == [slice(0, B - 1), slice(B - 1, B)]


def test_batch_slices_keep_candidates_with_their_query():
    """The released original regrouped rows list-major, so queries met other queries' passages."""
    batch = make_batch()
    part = batch[1:3]
    assert len(part) == 2
    assert part.passage_keys.tolist() == [[3, 4, 5], [6, 7, 8]]
    torch.testing.assert_close(part.passages.input_ids, batch.passages.input_ids[3:9])
    with pytest.raises(ValueError, match="do not fit"):
        Batch(batch.queries, batch.passages[:4], batch.passage_keys, batch.row_ids)


def test_row_pieces():
    batch = make_batch()
    lengths = torch.cat([batch.queries.attention_mask.sum(1), batch.passages.attention_mask.sum(1)])
    pieces = microbatch_rows(batch, 40)
    order = torch.cat(pieces)
    assert sorted(order.tolist()) == list(range(B + B * C))
    assert (lengths[order].diff() <= 0).all()  # the longest first
    sums = [int(lengths[piece].sum()) for piece in pieces]
    assert max(sums) <= 40
    assert all(total + int(lengths[after[0]]) > 40 for total, after in zip(sums, pieces[1:], strict=False))
    assert [len(piece) for piece in microbatch_rows(batch, 1)] == [1] * (B + B * C)


@pytest.mark.parametrize("tokens", [1, 25, 60])
def test_pieces_of_rows_give_the_full_batchs_gradient(model, tokens):
    """Even where a piece is less than a query with its candidates."""
    batch, loss = make_batch(), InfoNCE(0.05)
    loss(embed_batch(embedder(model), batch)).backward()
    expected = gradients(model)
    GradCache(embedder(model), loss).step(batch, [slice(0, B)], microbatch_rows(batch, tokens))
    assert_same_gradients(gradients(model), expected, 1e-10)
