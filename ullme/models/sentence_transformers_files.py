"""Pooling and prompts as sentence-transformers writes them beside a model: modules.json and what it names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ullme.prompts import Prompts

# sentence-transformers' poolings -> pooling. Older versions write a flag for each, newer ones a name.
POOLING_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}
_POOLING_NAMES = {"mean": "mean", "weightedmean": "weighted_mean", "cls": "first", "lasttoken": "last"}


@dataclass(frozen=True)
class Settings:
    """What the files say.

    Args:
        backbone: options of the backbone: pooling and attention.
        prompts: the prompt contract.
        undeclared: option -> value that is used although the files do not say so.
    """

    backbone: dict[str, Any]
    prompts: Prompts
    undeclared: dict[str, str]


def read_settings(folder: Path) -> Settings | None:
    """The settings of a sentence-transformers folder; None if it is none.

    sentence-transformers runs the LLM as transformers does, so attention is causal.

    Raises:
        ValueError: damaged files, a module that ullme does not have, or a pooling that it does not have.
    """
    if not (folder / "modules.json").is_file():
        return None
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
        pooling_file = folder / kinds["Pooling"] / "config.json" if "Pooling" in kinds else None
        pooling = json.loads(pooling_file.read_text(encoding="utf-8")) if pooling_file else None
        general_file = folder / "config_sentence_transformers.json"
        general = json.loads(general_file.read_text(encoding="utf-8")) if general_file.is_file() else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(folder)!r}: modules.json or a file it names is damaged ({error})") from error
    if other := sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"}):
        raise ValueError(
            f"{str(folder)!r}: modules.json names the module {other[0]}, which ullme does not have; embed with "
            "sentence-transformers, or remove modules.json to use the adapter without it"
        )
    backbone: dict[str, Any] = {"attention": "causal"}
    undeclared: dict[str, str] = {}
    if pooling is None:
        undeclared["pooling"] = "mean"
    else:
        backbone["pooling"] = _pooling(pooling, folder)
    prompts, said = _prompts(general)
    if pooling is not None and pooling.get("include_prompt") is False:
        prompts = Prompts.from_dict({**prompts.to_dict(), "pooled": "text"})
    if not said:
        undeclared["prompts"] = "the text alone"
    return Settings(backbone, prompts, undeclared)


def _pooling(config: dict[str, Any], folder: Path) -> str:
    """Raises: ValueError: several poolings, or one that ullme does not have."""
    mode = config.get("pooling_mode")
    if mode is not None:
        chosen = [mode] if isinstance(mode, str) else list(mode)
        known: dict[str, str] = _POOLING_NAMES
    else:
        chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        known = POOLING_FLAGS
    if len(chosen) != 1 or chosen[0] not in known:
        raise ValueError(
            f"{str(folder)!r}: the pooling {' and '.join(chosen) or 'none'} is not one of ullme's "
            f"({', '.join(known)}); embed with sentence-transformers, or remove modules.json and name a pooling"
        )
    return known[chosen[0]]


def _prompts(config: dict[str, Any]) -> tuple[Prompts, bool]:
    """The prompt contract, and whether the files name prompts for queries or passages."""
    prompts: dict[str, str] = config.get("prompts") or {}
    default = prompts.get(config.get("default_prompt_name") or "")
    query = prompts.get("query", default)
    passage = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), default)
    contract = Prompts(query=f"{query or ''}{{text}}", passage=f"{passage or ''}{{text}}")
    return contract, query is not None or passage is not None
