"""Writing the exported folder: weights and tokenizer by save_pretrained, and the files of sentence-transformers.

The module files are written in the form that every version of sentence-transformers reads, and vLLM and
text-embeddings-inference too: those do not all know the shorter form that sentence-transformers itself writes since
5.4 (vLLM issue 45995).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from ullme.commands.export.contract import POOLINGS, Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Prefix of a folder that is being written: .exporting.<process id>.<name>.
UNFINISHED = ".exporting"
_PLACE = "sentence_transformers.models"


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """A new folder next to ``target``, which is renamed to it at the end, or removed after an error.

    Raises:
        ValueError: the target is not empty or cannot be written.
    """
    target = Path(target)
    check_target(target)
    own = target.with_name(f"{UNFINISHED}.{os.getpid()}.{target.name}")
    try:
        try:
            _sweep(target)
            own.mkdir(parents=True)
            yield own
            if target.is_dir():
                target.rmdir()
            own.replace(target)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"--to {target} cannot be written ({reason}); free space or fix the permissions, or name another folder"
            ) from error
    finally:
        shutil.rmtree(own, ignore_errors=True)


def check_target(target: Path) -> None:
    """Check the target. Raises: ValueError: it is not empty, is a file, or cannot be written."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"--to {target} is a file; name a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"--to {target} is not empty, and files are not overwritten; name a new folder or remove it")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--to {target} cannot be written: {parent} is not writable; name another folder")


def _sweep(target: Path) -> None:
    """Remove the unfinished folders of killed exports to the same target."""
    for left in target.parent.glob(f"{UNFINISHED}.*.{target.name}"):
        process = left.name.removeprefix(f"{UNFINISHED}.").split(".")[0]
        if process.isdigit() and not Path(f"/proc/{process}").exists() and Path("/proc").is_dir():
            shutil.rmtree(left, ignore_errors=True)


def write_model(
    folder: Path,
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Layout,
    max_length: int,
    truncate_dim: int | None = None,
) -> None:
    """Write all files that ``SentenceTransformer(folder)`` and ``AutoModel.from_pretrained(folder)`` need.

    Args:
        folder: an empty one.
        decoder: in the dtype to be written.
        tokenizer: of :func:`~ullme.commands.export.contract.exported_tokenizer`.
        plan: pooling and prompts.
        max_length: in tokens, prompt included.
        truncate_dim: the dimensions to which embeddings are truncated; None does not truncate.
    """
    decoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    width = _width(decoder)
    key = dict(POOLINGS.values())[plan.pooling]
    pooling: dict[str, Any] = {name: name == key for name in (*(k for _, k in POOLINGS.values()), *_OTHER_POOLINGS)}
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    write_json(
        folder / "modules.json",
        [
            {"idx": n, "name": str(n), "path": path, "type": f"{_PLACE}.{kind}"}
            for n, (path, kind) in enumerate(modules)
        ],
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": width, **pooling, "include_prompt": plan.include_prompt},
    )
    (folder / "2_Normalize").mkdir()
    general: dict[str, Any] = {"prompts": plan.prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    if truncate_dim is not None:
        general["truncate_dim"] = truncate_dim
    write_json(folder / "config_sentence_transformers.json", general)


_OTHER_POOLINGS = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens")


def _width(decoder: PreTrainedModel) -> int:
    config = decoder.config.get_text_config()
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON with a newline at the end; the folder is made."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
