"""The commands that serve an exported folder, as far as vLLM, text-embeddings-inference and llama.cpp can."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ullme.commands.export.job import Exported
    from ullme.models.ullme import ULLME

# Families for which text-embeddings-inference has code of its own, by transformers' model_type.
TEI_FAMILIES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
_LLAMA_CPP = {"mean": "mean", "cls": "cls", "lasttoken": "last"}


def serving(model: ULLME, done: Exported) -> str:
    """A section of the model card. The servers were not run; the flags are those of their documentation."""
    assert done.layout is not None
    pooling, family = done.layout.pooling, model.causal_lm.config.get_text_config().model_type
    bidirectional = model.options.attention == "bidirectional"
    lines = [
        "## Serving",
        "Flags from the servers' documentation; compare a few vectors with sentence-transformers' before relying on "
        "one. Servers embed what they are sent: put the prompt in front of the text.",
    ]
    if not done.layout.include_prompt or pooling == "weightedmean":
        kind = "weighted mean pooling" if pooling == "weightedmean" else "a prompt that is not pooled"
        return "\n\n".join([*lines, f"None of vLLM, text-embeddings-inference and llama.cpp has {kind}."])
    overrides = "--hf-overrides '{\"is_causal\": false}' " if bidirectional else ""
    lines.append(
        f"```\nvllm serve FOLDER --runner pooling --convert embed {overrides}--max-model-len {done.max_length}\n```"
    )
    if family in TEI_FAMILIES:
        lines.append("```\ntext-embeddings-router --model-id FOLDER --auto-truncate\n```")
    attention = "non-causal" if bidirectional else "causal"
    size = done.max_length
    lines.append(
        "```\npython convert_hf_to_gguf.py FOLDER --outfile model.gguf\n"
        f"llama-server -m model.gguf --embedding --pooling {_LLAMA_CPP[pooling]} --attention {attention} "
        f"-c {size} -b {size} -ub {size}\n```"
    )
    return "\n\n".join(lines)
