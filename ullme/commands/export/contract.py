"""Translating the prompt contract for sentence-transformers: a prompt before the text, special tokens after it.

What sentence-transformers cannot express exactly is refused here, before any weight is touched.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ullme.prompts import Prompts, PromptTokenizer, Role, begin_and_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# pooling -> (sentence-transformers' name, its key in 1_Pooling/config.json)
POOLINGS = {
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "weighted_mean": ("weightedmean", "pooling_mode_weightedmean_tokens"),
    "first": ("cls", "pooling_mode_cls_token"),
    "last": ("lasttoken", "pooling_mode_lasttoken"),
}
# role -> the name of its prompt in config_sentence_transformers.json
PROMPT_NAMES: dict[Role, str] = {"query": "query", "passage": "document"}
_REMEDY = "evaluate it with ullme, or export with --adapter_only"


@dataclass(frozen=True)
class Layout:
    """The settings of sentence-transformers.

    Args:
        pooling: the name in sentence-transformers.
        prompts: of queries and documents; ``passage`` repeats the document's.
        include_prompt: whether the prompt's tokens are pooled too.
        ending: special tokens that the tokenizer has to put between a text and its own end token, or to append.
    """

    pooling: str
    prompts: dict[str, str]
    include_prompt: bool
    ending: tuple[str, ...]


def layout(prompts: Prompts, pooling: str, tokenizer: PreTrainedTokenizerBase) -> Layout:
    """Express the contract as a prompt before the text and special tokens after it.

    Raises:
        ValueError: a pooling with trained weights; a template with the text twice or with words after it; query and
            passage templates that end differently.
    """
    if pooling not in POOLINGS:
        why = "is a function of your own" if "." in pooling else "has trained weights"
        raise ValueError(f"pooling={pooling!r} {why} that sentence-transformers has no module for; {_REMEDY}")
    prompt_tokenizer = PromptTokenizer(tokenizer, prompts)
    before, after = {}, {}
    for role in PROMPT_NAMES:
        pieces = prompt_tokenizer.around(role)
        template = getattr(prompts, role)
        if len(pieces) > 2:
            raise ValueError(
                f"prompts.{role}={template!r} holds {{text}} twice, and sentence-transformers puts a prompt in front "
                f"of one text only; {_REMEDY}"
            )
        before[role], after[role] = pieces
    if after["query"] != after["passage"]:
        raise ValueError(
            f"prompts.query ends with {after['query']!r} and prompts.passage with {after['passage']!r}; "
            f"sentence-transformers ends all texts the same way; {_REMEDY}"
        )
    ending = _special_tokens(after["query"], tokenizer)
    if ending is None:
        raise ValueError(
            f"prompts.query={prompts.query!r}: words after {{text}} merge with its last tokens, which "
            f"sentence-transformers cannot do: only special tokens may follow the text; {_REMEDY}"
        )
    if not begin_and_end(tokenizer)[1]:  # else the tokenizer goes on ending texts by itself
        ending += tokenizer.convert_ids_to_tokens(prompt_tokenizer.end)
    named = {name: before[role] for role, name in PROMPT_NAMES.items()}
    return Layout(
        pooling=POOLINGS[pooling][0],
        prompts={**named, "passage": named["document"]},
        include_prompt=prompts.pooled == "all",
        ending=tuple(ending),
    )


def _special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """Split a text into added tokens, which never merge with their neighbours; None if it holds anything else."""
    found = []
    added = sorted(tokenizer.added_tokens_decoder.values(), key=lambda token: -len(token.content))
    while text:
        token = next((t for t in added if text.startswith(t.content)), None)
        if token is None or token.lstrip or token.rstrip or token.single_word:
            return None
        found.append(token.content)
        text = text[len(token.content) :]
    return found


def exported_tokenizer(tokenizer: PreTrainedTokenizerBase, plan: Layout, max_length: int) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that appends tokens, truncates and pads as the contract does.

    It pads on the right: families with absolute positions (GPT-2) count them from the left.

    Raises:
        ValueError: a slow tokenizer, which cannot append tokens.
    """
    fitted = copy.deepcopy(tokenizer)
    fitted.padding_side = fitted.truncation_side = "right"
    fitted.model_max_length = max_length
    if plan.ending:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot end texts with {' '.join(plan.ending)}: it is not a fast "
                f"tokenizer; {_REMEDY}"
            )
        _end_texts(fitted, plan.ending)
    return fitted


def _end_texts(tokenizer: Any, ending: Sequence[str]) -> None:
    """Put special tokens behind the text in the tokenizer's template; a tokenizer without one gets one.

    A second template after the first would not work: it takes the first one's begin token for a text.

    Raises:
        ValueError: a post-processor of another kind.
    """
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    own = state["post_processor"]
    parts = [] if own is None else own["processors"] if own["type"] == "Sequence" else [own]
    if odd := [part["type"] for part in parts if part["type"] not in ("TemplateProcessing", "ByteLevel")]:
        raise ValueError(
            f"the tokenizer cannot end texts with {' '.join(ending)}: it has a {odd[0]} post-processor; {_REMEDY}"
        )
    template = next((part for part in parts if part["type"] == "TemplateProcessing"), None)
    if template is None:
        first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
        template = {"type": "TemplateProcessing", "single": [first], "pair": [first, second], "special_tokens": {}}
        parts = [*parts, template]
    for pieces in (template["single"], template["pair"]):
        text = max(n for n, piece in enumerate(pieces) if "Sequence" in piece)
        pieces[text + 1 : text + 1] = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ending]
    for token in ending:
        number = tokenizer.convert_tokens_to_ids(token)
        template["special_tokens"][token] = {"id": token, "ids": [number], "tokens": [token]}
    state["post_processor"] = {"type": "Sequence", "processors": parts}
    backend.post_processor = Tokenizer.from_str(json.dumps(state)).post_processor


def check_tokens(
    ours: PromptTokenizer, fitted: PreTrainedTokenizerBase, plan: Layout, texts: Sequence[str], max_length: int
) -> None:
    """Check that the exported tokenizer gives the same tokens as the contract, and that pooling starts at the same one.

    Args:
        ours: the contract's tokenizer.
        fitted: the exported tokenizer.
        plan: the settings of sentence-transformers.
        texts: to compare, some longer than ``max_length``.
        max_length: in tokens, prompt included.

    Raises:
        ValueError: the tokens of a text differ.
    """
    for role, name in PROMPT_NAMES.items():
        prompt = plan.prompts[name]
        rows, starts = ours.rows(list(texts), role, max_length=max_length)
        theirs = fitted([prompt + text for text in texts], truncation=True, max_length=max_length)["input_ids"]
        for text, row, other in zip(texts, rows, theirs, strict=True):
            if row != other:
                raise ValueError(
                    f"the {role} {text[:40]!r} has the tokens {row[:8]}...{row[-4:]} ({len(row)}) under the prompt "
                    f"contract and {other[:8]}...{other[-4:]} ({len(other)}) in sentence-transformers; its tokenizer "
                    f"cannot express this contract; {_REMEDY}"
                )
        skipped = _prompt_tokens(fitted, prompt)
        for text, start in zip(texts, starts or [], strict=False):
            if start != skipped:
                raise ValueError(
                    f"prompts.pooled=text: of the {role} {text[:40]!r} {start} tokens are left out of the pooling, and "
                    f"sentence-transformers would leave out {skipped} (those of the prompt alone); use a template "
                    f"whose end does not merge with the text and a tokenizer without a begin token, or {_REMEDY}"
                )


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """The number of tokens that sentence-transformers counts as the prompt, and leaves out of the pooling."""
    if not prompt:
        return 0
    ids = tokenizer(prompt)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)
