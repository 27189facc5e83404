"""The README.md of an exported folder: how to use it, how it was trained, what it scores."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import ullme
from ullme.commands.export.scores import Score
from ullme.commands.export.serving import serving
from ullme.commands.export.source import CONFIG_COPY, Source

if TYPE_CHECKING:
    from ullme.commands.export.job import Exported
    from ullme.models.ullme import ULLME


# Suffixes of data files: a relative path to one looks like a name on the hub.
_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst")


@dataclass(frozen=True)
class Description:
    """The contents of a card that the model itself does not have.

    Args:
        title: of the card.
        source: where the model comes from.
        scores: of mteb.
        license: an identifier of the hub's list, or None.
    """

    title: str
    source: Source
    scores: list[Score] = field(default_factory=list)
    license: str | None = None


def write_card(folder: Path, model: ULLME, done: Exported, what: Description) -> None:
    """Write README.md, and beside it the run's configuration without secrets."""
    from huggingface_hub import ModelCard

    config = what.source.config
    if config is not None:
        (folder / CONFIG_COPY).write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    adapter = done.layout is None
    parts = [
        f"# {what.title}",
        _introduction(model, done),
        _adapter_use(model) if adapter else _use(model, done, what.title),
        _prompts(model),
        _training(what.source, model),
        _scores(what.scores),
        "" if adapter else serving(model, done),
        _versions(done),
    ]
    text = "\n\n".join(part for part in parts if part)
    ModelCard(f"---\n{_metadata(model, done, what).to_yaml()}\n---\n\n{text}\n").save(folder / "README.md")


def _metadata(model: ULLME, done: Exported, what: Description) -> Any:
    """The YAML header, which the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    adapter = done.layout is None
    base = model.options.model_name_or_path
    train = ((what.source.config or {}).get("data") or {}).get("train")
    results = [
        EvalResult(
            task_type="text-embedding",
            dataset_type=f"mteb/{score.task}",
            dataset_name=f"MTEB {score.task}",
            dataset_revision=score.revision or None,
            metric_type="main_score",
            metric_value=round(score.value, 2),
        )
        for score in what.scores
    ]
    tags = ["feature-extraction", "sentence-similarity", "ullme"]
    return ModelCardData(
        library_name="peft" if adapter else "sentence-transformers",
        pipeline_tag="feature-extraction" if adapter else "sentence-similarity",
        tags=[*tags, "lora"] if adapter else [*tags, "sentence-transformers", "text-embeddings-inference"],
        base_model=base if is_hub_name(base) else None,
        base_model_relation=("adapter" if adapter else "finetune") if is_hub_name(base) else None,
        datasets=[train] if isinstance(train, str) and is_hub_name(train) else None,
        license=what.license,
        model_name=what.title if results else None,
        eval_results=results or None,
    )


def is_hub_name(name: str) -> bool:
    """Whether a name may be a repository of the hub: ``organisation/name``, and not a local path."""
    parts = name.split("/")
    path = name.startswith((".", "~")) or Path(name).suffix in _FILES or os.path.exists(name)
    return len(parts) == 2 and all(parts) and not path


def _shown(name: str) -> str:
    """A hub name, or the last part of a path: a card does not show paths of the machine that wrote it."""
    return name if is_hub_name(name) else Path(name).name


def _introduction(model: ULLME, done: Exported) -> str:
    options, adapter = model.options, done.layout is None
    length = "" if done.truncate_dim is None else f", the first of {model.hidden_size}"
    dims = ", ".join(str(dim) for dim in model.matryoshka_dims if dim < done.dimensions)
    nested = (
        f" It was trained so that an embedding's first {dims} dimensions, normalised again, are embeddings too "
        "([arXiv 2205.13147](https://arxiv.org/abs/2205.13147))."
        if dims
        else ""
    )
    kind = "A LoRA adapter that turns" if adapter else "A text-embedding model:"
    base = f"`{_shown(options.model_name_or_path)}`"
    turned = f"{kind} {base} into a text-embedding model" if adapter else f"{kind} {base}"
    return (
        f"{turned}, with {options.attention} attention, {options.pooling.replace('_', ' ')} pooling and vectors of "
        f"{done.dimensions} numbers{length or ' of unit length'}.{nested} Made with ULLME {ullme.__version__} "
        "([arXiv 2408.03402](https://arxiv.org/abs/2408.03402))."
    )


def _use(model: ULLME, done: Exported, title: str) -> str:
    assert done.layout is not None
    needs = "transformers>=5.2" if model.options.attention == "bidirectional" else "transformers"
    lines = [
        "## Use",
        f'```\npip install -U sentence-transformers "{needs}"\n```',
        "```python\n"
        "from sentence_transformers import SentenceTransformer\n\n"
        f'model = SentenceTransformer("{title}")  # the name on the hub, or this folder\n'
        'queries = model.encode_query(["who founded the town?"])\n'
        'passages = model.encode_document(["The town was founded by two brothers."])\n'
        "scores = model.similarity(queries, passages)\n```",
    ]
    if model.options.attention == "bidirectional":
        lines.append(
            "Attention looks both ways because config.json says `is_causal: false`, which transformers knows since "
            "5.2; older versions ignore it and stay causal."
        )
    if done.truncate_dim is not None:
        lines.append(
            f"sentence-transformers truncates embeddings to {done.dimensions} dimensions and compares them by cosine; "
            "where they are compared otherwise, pass `normalize_embeddings=True`. A server may return all "
            f"{model.hidden_size}: take the first {done.dimensions}, and normalise."
        )
    if done.layout.ending:
        ending = " ".join(f"`{token}`" for token in done.layout.ending)
        lines.append(f"The tokenizer ends every text with {ending}, as the model was trained.")
    if done.layout.include_prompt:
        lines.append(_plain_use(model, done, title))
    return "\n\n".join(lines)


def _plain_use(model: ULLME, done: Exported, title: str) -> str:
    """The example with transformers alone."""
    assert done.layout is not None
    pool = {
        "mean": "vectors = (hidden * mask).sum(1) / mask.sum(1)",
        "weightedmean": "mask = mask * mask.cumsum(1)\nvectors = (hidden * mask).sum(1) / mask.sum(1)",
        "cls": "vectors = hidden[:, 0]",
        "lasttoken": "vectors = hidden[torch.arange(len(hidden)), mask[..., 0].sum(1).long() - 1]",
    }[done.layout.pooling]
    if done.truncate_dim is not None:
        pool += f"\nvectors = vectors[:, :{done.truncate_dim}]"
    prompt = done.layout.prompts["query"]
    texts = '["who founded the town?"]'
    put = f"[{prompt!r} + text for text in {texts}]" if prompt else texts
    return (
        "With transformers alone:\n\n"
        "```python\n"
        "import torch\nfrom transformers import AutoModel, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")\nmodel = AutoModel.from_pretrained("{title}").eval()\n'
        f"texts = {put}\n"
        f'batch = tokenizer(texts, padding=True, truncation=True, max_length={done.max_length}, return_tensors="pt")\n'
        "with torch.no_grad():\n    hidden = model(**batch).last_hidden_state.float()\n"
        'mask = batch["attention_mask"][..., None].float()\n'
        f"{pool}\nvectors = torch.nn.functional.normalize(vectors, dim=-1)\n```"
    )


def _adapter_use(model: ULLME) -> str:
    return (
        "## Use\n\n```python\nfrom ullme.models.checkpoint import load_ullme\n\n"
        'model = load_ullme("FOLDER")\n'
        'vectors = model.encode(["who founded the town?"], role="query")\n```\n\n'
        "PEFT loads it too (`PeftModel.from_pretrained(llm, FOLDER)`), for generation for example; attention, pooling "
        "and prompts of the embedder are in `ullme.json`, which PEFT does not read."
    )


def _prompts(model: ULLME) -> str:
    prompts = model.prompts
    rows = [("query", prompts.query), ("passage", prompts.passage), ("instruction", prompts.instruction)]
    table = "\n".join(f"| {name} | `{_cell(value)}` |" for name, value in rows)
    pooled = "" if prompts.pooled == "all" else "\n\nOnly the text is pooled, not the prompt before it."
    return (
        f"## Prompts\n\n| | |\n|---|---|\n{table}\n\n"
        "For another task put its instruction into the query's template and pass that as "
        f"`model.encode(texts, prompt=...)`.{pooled}"
    )


def _cell(text: str) -> str:
    return text.replace("\n", "\\n").replace("|", "\\|")


def _training(source: Source, model: ULLME) -> str:
    if source.checkpoint is None:
        return "## Training\n\nNone: this is the LLM as it is."
    options, config = model.options, source.config or {}
    data, optimizer = config.get("data") or {}, (config.get("model") or {}).get("optimizer") or {}
    trainer, loss = config.get("trainer") or {}, config.get("loss") or {}
    backbone = (config.get("model") or {}).get("backbone") or {}
    trained = {"lora": f"LoRA, r {backbone.get('lora_r')}, alpha {backbone.get('lora_alpha')}"}
    kind = backbone.get("train") or ("lora" if backbone.get("lora_name") else "all")
    steps = "" if source.step is None else str(source.step)
    rows = {
        "LLM": _shown(options.model_name_or_path),
        "trained": trained.get(kind, kind) if backbone else None,
        "objective": _objective(loss),
        "data": _data(data),
        "queries in a batch": data.get("batch_size"),
        "hard negatives": data.get("num_hard_negatives"),
        "optimizer": f"AdamW, lr {optimizer['lr']}, {optimizer.get('schedule')}" if "lr" in optimizer else None,
        "precision": trainer.get("precision"),
        "optimizer steps": steps,
        "seed": config.get("seed_everything"),
        "built on an earlier run": None if source.merged_from is None else _shown(source.merged_from),
    }
    table = "\n".join(f"| {name} | {_cell(str(value))} |" for name, value in rows.items() if value not in (None, ""))
    text = f"## Training\n\n| | |\n|---|---|\n{table}"
    if source.config is None:
        return text
    return (
        f"{text}\n\nThe whole configuration is [{CONFIG_COPY}]({CONFIG_COPY}); the same training again:\n\n"
        f"```\nullme train fit --config {CONFIG_COPY} --trainer.default_root_dir NEW_FOLDER\n```"
    )


def _objective(loss: dict[str, Any]) -> str:
    """The names of the loss and its terms, with their settings."""
    init = loss.get("init_args") or {}
    terms = init.get("terms") or []
    named = [_term(term) for term in (terms if isinstance(terms, list) else [terms])]
    return ", ".join([str(loss.get("class_path", "")).split(".")[-1], *named]).strip(", ")


def _term(term: dict[str, Any]) -> str:
    values = (term.get("init_args") or {}).items()
    shown = {k: _term(v) if isinstance(v, dict) and "class_path" in v else v for k, v in values}
    settings = ", ".join(f"{k} {v}" for k, v in shown.items() if v is not None and not isinstance(v, dict))
    name = str(term.get("class_path", "")).split(".")[-1]
    return f"{name} ({settings})" if settings else name


def _data(data: dict[str, Any]) -> str:
    several = data.get("datasets")
    if isinstance(several, list) and several:
        return f"{len(several)} datasets, see the configuration"
    return _shown(str(data["train"])) if data.get("train") else ""


def _scores(scores: list[Score]) -> str:
    if not scores:
        return ""
    mean = sum(score.value for score in scores) / len(scores)
    rows = [f"| {_cell(score.task)} | {score.value:.2f} |" for score in scores]
    head = ["## Scores", "", "Main scores of mteb, times 100.", "", "| Task | Score |", "|---|---:|"]
    return "\n".join([*head, *rows, f"| Mean of {len(scores)} | {mean:.2f} |"])


def _versions(done: Exported) -> str:
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "sentence-transformers")
    found = ", ".join(f"{name} {version(name)}" for name in names)
    if done.layout is None:
        checked = f"loaded by PEFT the logits differ by at most {done.loaded:.0e} of the largest"
    else:
        checked = (
            f"merging changed no component of an embedding by more than {done.merged:.0e}, rounding to {done.dtype} "
            f"no embedding by more than {done.rounded:.0e} (1 - cosine), and loaded by sentence-transformers no "
            f"component differs by more than {done.loaded:.0e}"
        )
    return f"## Made with\n\n{found}. On the texts tried, computed in float32: {checked}."
