"""``ullme export RUN --to FOLDER``: a trained model as a folder that needs no code of this project."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from ullme.commands.evaluate import MODEL_OPTIONS, PROMPT_OPTIONS

if TYPE_CHECKING:
    from ullme.commands.export.job import Exported
    from ullme.commands.export.source import Source

DESCRIPTION = (
    "Merge what a run trained into its LLM and write one folder that sentence-transformers and transformers load "
    "without ullme: same texts, same embeddings, which is checked before the folder gets its name."
)
_FROM_EVALUATION = ("model_backbone_type", "pooling", "attention", "quantization", "device")


def parser() -> ArgumentParser:
    """The options; every one may also stand in a YAML file given with --config."""
    options = ArgumentParser(prog="ullme export", description=DESCRIPTION, exit_on_error=False)
    options.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these options")
    options.add_argument("run", nargs="?", type=str | None, help="run folder, .ckpt file or PEFT adapter folder")
    options.add_argument("--to", type=str | None, metavar="FOLDER", help="a new or empty folder")
    model = options.add_argument_group("Model")
    model.add_argument(
        "--model", type=str | None, help="hub name or folder of an LLM: instead of a run, or to load a run onto"
    )
    for name in _FROM_EVALUATION:
        model.add_argument(f"--{name}", type=MODEL_OPTIONS[name][0] | None, help=MODEL_OPTIONS[name][1])
    for name, (_, type_, text) in PROMPT_OPTIONS.items():
        model.add_argument(f"--{name}", type=type_ | None, help=f"{text}; the run's unless given")
    output = options.add_argument_group("What is written")
    output.add_argument("--adapter_only", action="store_true", help="the adapter as a folder for PEFT, unmerged")
    output.add_argument("--dtype", type=str, default="auto", help="of the weights: auto, float32, bfloat16 or float16")
    output.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest 1 - cosine by which the dtype may change an embedding"
    )
    output.add_argument("--max_length", type=int, default=512, help="where a text is cut, in tokens, prompt included")
    output.add_argument("--texts", type=str | None, metavar="FILE", help="texts to compare on, one a line")
    output.add_argument("--progress", type=bool, default=True, help="progress bar")
    card = options.add_argument_group("Model card and hub")
    card.add_argument("--results", type=str | None, metavar="FOLDER", help="result files of evaluate.py, for the card")
    card.add_argument("--title", type=str | None, help="of the card; the hub's name or the folder's unless given")
    card.add_argument("--license", type=str | None, help="identifier of the hub's list, such as apache-2.0")
    card.add_argument("--push_to_hub", "--push-to-hub", type=str | None, metavar="NAME", help="organisation/name")
    card.add_argument("--private", action="store_true", help="make a new repository on the hub a private one")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Export and say where.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake of the user, explained in one line.
    """
    try:
        options = parser().parse_args(argv)
        _check(options)
        return _run(options)
    except (ArgumentError, ValueError) as error:
        if os.environ.get("ULLME_TRACEBACK"):
            raise
        print(f"export: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _check(options: Any) -> None:
    """Refuse what can be refused before the slow imports."""
    if options.run is None and options.model is None:
        raise ValueError("nothing to export: name a run folder, a .ckpt or a PEFT folder, or give --model NAME")
    if options.run is not None and not Path(options.run).exists():
        raise ValueError(f"{options.run}: no such run; give a run folder, a .ckpt file or a PEFT folder")
    if options.to is None:
        raise ValueError("--to FOLDER is missing: name a new folder")
    if options.adapter_only and options.run is None:
        raise ValueError("--adapter_only: an LLM that was not trained has no adapter; name a run")
    if options.adapter_only and options.dtype != "auto":
        raise ValueError(f"--dtype {options.dtype}: an adapter is written in float32; leave out --dtype")
    if options.private and options.push_to_hub is None:
        raise ValueError("--private is for --push_to_hub NAME; give both or none")
    from ullme.commands.export.folder import check_target

    check_target(Path(options.to))


def _run(options: Any) -> int:
    _quiet()
    from ullme.commands.export import hub
    from ullme.commands.export.job import export_adapter, export_model
    from ullme.commands.export.model_card import Description, write_card
    from ullme.commands.export.scores import read_scores
    from ullme.commands.export.source import Source, find_source
    from ullme.commands.export.texts import try_out
    from ullme.models.checkpoint import load_embedder, usable_device

    if options.push_to_hub is not None:
        hub.check_push(options.push_to_hub)
    texts = try_out(options.texts)
    scores = [] if options.results is None else read_scores(options.results)
    source = Source() if options.run is None else find_source(options.run)
    title = options.title or options.push_to_hub or Path(options.to).resolve().name
    what = Description(title, source, scores, options.license)
    model = load_embedder(options.model, source.checkpoint, _model_options(options, source))
    model.to(usable_device(options.device))

    def describe(folder: Path, done: Exported) -> None:
        write_card(folder, model, done, what)

    common: dict[str, Any] = {"texts": texts, "extra": describe, "show_progress_bar": options.progress}
    if options.adapter_only:
        done = export_adapter(model, options.to, **common)
    else:
        limits = {"dtype": options.dtype, "max_length": options.max_length, "tolerance": options.tolerance}
        done = export_model(model, options.to, **limits, **common)
    print(_summary(done))
    if options.push_to_hub is not None:
        print(f"uploaded to {hub.push(done.folder, options.push_to_hub, options.private)}")
    return 0


def _model_options(options: Any, source: Source) -> dict[str, Any]:
    """Raises: ValueError: a run on a quantised LLM, without being told what to merge its adapter into."""
    if source.quantization != "none" and options.quantization is None:
        raise ValueError(
            f"the run was trained on an LLM in few bits (quantization={source.quantization}), into which nothing is "
            "merged; --quantization none takes the LLM as it is stored, on which the adapter was not trained, so that "
            "embeddings differ a little: evaluate the exported folder"
        )
    given = {name: options[name] for name in _FROM_EVALUATION if name != "device" and options[name] is not None}
    prompts = {field: options[name] for name, (field, *_) in PROMPT_OPTIONS.items() if options[name] is not None}
    # it embeds a few texts and is thrown away: neither worth compiling nor short of memory for gradients
    fixed = {"compile": False, "gradient_checkpointing": False}
    return {**fixed, **given, **({"prompts": prompts} if prompts else {})}


def _summary(done: Exported) -> str:
    if done.layout is None:
        return f"{done.folder}: the adapter; loaded by PEFT its logits differ by at most {done.loaded:.0e}"
    return (
        f"{done.folder}: {done.dtype}, up to {done.max_length} tokens\n"
        f"  merged = adapter to {done.merged:.0e}; {done.dtype} costs 1 - cosine {done.rounded:.0e}; "
        f"sentence-transformers = ullme to {done.loaded:.0e}"
    )


def _quiet() -> None:
    """Leave the progress bar, and drop the warnings and the bars of the libraries below it."""
    warnings.filterwarnings("ignore")
    for library in ("transformers", "sentence_transformers", "huggingface_hub", "peft"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
