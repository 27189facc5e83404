"""Embed many texts: sorted by length, in batches of about equally many tokens, returned in the original order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import torch
from torch import Tensor

from ullme.losses.matryoshka import truncated
from ullme.models import compression
from ullme.prompts import Role
from ullme.token_rows import TokenRows
from ullme.utils.modes import evaluation_mode

if TYPE_CHECKING:
    import numpy as np

    from ullme.models.compression import Precision
    from ullme.models.interface import Embedder

Rows = TypeVar("Rows")
EmbedBlocks = Callable[["Embedder", Iterable[TokenRows]], Iterator[Tensor]]

# Texts are tokenised and sorted this many at a time, and no more than so many characters (about 150 bytes a token in a
# tokenizer), so that the tokens of a large corpus, or of long documents, need not fit into memory.
_WINDOW = 20_000
_WINDOW_CHARACTERS = 4_000_000

# Default tokens in a batch by device type: few enough for a CPU's cache, or enough to keep a GPU busy.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Row indices in order of decreasing length, split into batches of at most ``budget`` tokens (or of one row)."""
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batch and tokens + lengths[index] > budget:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch


def windows(texts: Sequence[str], around: Sequence[int] = (0,)) -> Iterator[slice]:
    """Consecutive texts, up to the limits above; a text that is longer by itself is alone.

    Args:
        texts: R texts.
        around: characters of the prompt around every text, or around each of them.
    """
    start = characters = 0
    for n, text in enumerate(texts):
        length = len(text) + around[n if len(around) > 1 else 0]
        if n > start and (n - start == _WINDOW or characters + length > _WINDOW_CHARACTERS):
            yield slice(start, n)
            start, characters = n, 0
        characters += length
    if texts:
        yield slice(start, len(texts))


def _tokenised_ahead(windows: Iterable[slice], tokenise: Callable[[slice], Rows]) -> Iterator[tuple[slice, Rows]]:
    """Each window with its rows; the next one is tokenised in a thread while this one is embedded."""
    with ThreadPoolExecutor(1, "tokenise") as thread:
        ahead: deque[tuple[slice, Future[Rows]]] = deque()
        for window in windows:
            ahead.append((window, thread.submit(tokenise, window)))
            if len(ahead) == 2:
                first, rows = ahead.popleft()
                yield first, rows.result()
        for window, rows in ahead:
            yield window, rows.result()


@torch.no_grad()
def embed_blocks(model: Embedder, blocks: Iterable[TokenRows]) -> Iterator[Tensor]:
    """Embed padded blocks of R rows: yields (R, D) each, in float32 on the CPU."""
    for block in blocks:
        rows = block.to(model.device)
        yield model(rows.input_ids, rows.attention_mask, pool_mask=rows.pool_mask, host=rows.host)["rep"].float().cpu()


def _token_budget(batch_size: int | None, lengths: list[int], device: torch.device) -> int:
    """Tokens in a batch: of ``batch_size`` texts of average length, or the device's default."""
    if batch_size is None:
        return _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cuda"])
    return max(1, batch_size * sum(lengths) // len(lengths))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_list(texts: Sequence[str]) -> list[str]:
    """Raises: ValueError: a text instead of a list, or an entry that is no text."""
    if isinstance(texts, str):
        raise ValueError(f"texts={texts!r}: give a list of texts; one text is [text]")
    texts = list(texts)
    if (n := next((n for n, text in enumerate(texts) if not isinstance(text, str)), None)) is not None:
        raise ValueError(f"texts[{n}]={texts[n]!r} is a {type(texts[n]).__name__}; every text must be a str")
    if (n := next((n for n, text in enumerate(texts) if not _is_utf8(text)), None)) is not None:
        raise ValueError(f"texts[{n}]={texts[n]!r:.80} holds half a surrogate pair, which is no character; remove it")
    return texts


def _check_finite(rep: Tensor, texts: Sequence[str], batch: Sequence[int], start: int, model: Embedder) -> None:
    """Refuse what is no embedding; a ranking of NaN would have a score all the same.

    Args:
        rep: (R, D) embeddings of a batch.
        texts: of a window.
        batch: the places of the R texts in it.
        start: the place of the window's first text among all.
        model: that embedded them, for the message.

    Raises:
        ValueError: an embedding that is NaN or infinite.
    """
    finite = rep.isfinite().all(dim=1)
    if not finite.all():
        place = batch[int(finite.int().argmin())]
        dtype = str(next(p for _, p in model.named_parameters()).dtype).removeprefix("torch.")
        raise ValueError(
            f"the embedding of texts[{start + place}]={texts[place]!r:.80} is not finite, with weights in {dtype}; "
            "load the LLM with dtype=float32 (or bfloat16: float16 overflows in many LLMs), or, where it is not finite "
            "in float32 either, another checkpoint: its weights are damaged"
        )


def encode(
    model: Embedder,
    texts: Sequence[str],
    role: Role | None,
    instruction: str | Sequence[str | None] | None,
    batch_size: int | None,
    max_length: int,
    show_progress_bar: bool,
    convert_to_tensor: bool,
    truncate_dim: int | None = None,
    precision: Precision = "float32",
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray | Tensor:
    """See :meth:`ullme.models.ULLME.encode`; ``on_batch`` is called with the number of texts of each batch.

    Raises:
        ValueError: a text or option that cannot be used, or an embedding that is not finite.
    """
    from tqdm.auto import tqdm

    texts = _as_list(texts)
    if max_length < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"batch_size={batch_size}, max_length={max_length}: both must be at least 1")
    if role is not None and role not in get_args(Role):
        raise ValueError(f"role={role!r}: choose {', '.join(get_args(Role))} or None")
    compression.check_truncate_dim(truncate_dim, model.hidden_size)
    compression.warn_untrained_dim(model, truncate_dim)
    compression.check_precision(precision, len(texts))
    max_length = min(max_length, model.max_positions)
    instructions = [instruction] if instruction is None or isinstance(instruction, str) else list(instruction)
    shared = instruction is None or isinstance(instruction, str)
    if not shared and len(instructions) != len(texts):
        raise ValueError(f"instruction: {len(instructions)} of them for {len(texts)} texts; give one, or one for each")
    tokenizer = model.prompt_tokenizer
    if role is not None:
        for text in set(instructions):
            tokenizer.check_length(role, max_length, text)

    prompts = {text: sum(map(len, tokenizer.prompts.around(role, text))) for text in set(instructions)}
    around = [prompts[text] for text in instructions] or [0]

    def tokenise(window: slice) -> Any:
        task = instruction if shared else instruction[window]  # type: ignore[index]
        return tokenizer.rows(texts[window], role, max_length=max_length, instruction=task)

    width = truncate_dim or model.hidden_size
    out = torch.empty((len(texts), width), dtype=torch.float32)
    bar = tqdm(total=len(texts), unit="text", desc="encode", disable=not show_progress_bar)
    with bar, evaluation_mode(model):
        for window, (rows, starts) in _tokenised_ahead(windows(texts, around), tokenise):
            lengths = [len(row) for row in rows]
            budget = _token_budget(batch_size, lengths, model.device)
            batches = list(token_batches(lengths, budget))
            blocks = (
                tokenizer.pad([rows[n] for n in batch], starts and [starts[n] for n in batch]) for batch in batches
            )
            for batch, rep in zip(batches, model.embed_blocks(model, blocks), strict=True):
                _check_finite(rep, texts[window], batch, window.start, model)
                out[torch.tensor(batch) + window.start] = rep if truncate_dim is None else truncated(rep, width)
                bar.update(len(batch))
                if on_batch is not None:
                    on_batch(len(batch))
    if precision == "float32":
        return out if convert_to_tensor else out.numpy()
    quantized = compression.quantize(out, precision)
    return torch.from_numpy(quantized) if convert_to_tensor else quantized
