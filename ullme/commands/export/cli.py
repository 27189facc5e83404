"""The command line of ``ullme export``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentParser

from ullme.commands.evaluate import MODEL_OPTIONS, PROMPT_OPTIONS
from ullme.utils.errors import run_command
from ullme.utils.unused_options import warn_of_unused

if TYPE_CHECKING:
    from ullme.commands.export.job import Exported
    from ullme.commands.export.source import Source

DESCRIPTION = (
    "Merge what a run trained into its LLM and write a folder that sentence-transformers and transformers load without "
    "ullme. The embeddings are compared before the folder gets its name."
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
        model.add_argument(f"--{name}", type=type_ | None, help=f"{text} (default: the run's)")
    output = options.add_argument_group("What is written")
    output.add_argument("--adapter_only", action="store_true", help="the adapter as a folder for PEFT, unmerged")
    output.add_argument("--dtype", type=str, default="auto", help="of the weights: auto, float32, bfloat16 or float16")
    output.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest 1 - cosine by which the dtype may change an embedding"
    )
    output.add_argument("--max_length", type=int, default=512, help="truncate texts to so many tokens, prompt included")
    output.add_argument(
        "--truncate_dim", type=int | None, help="keep so many of an embedding's first dimensions (default: all)"
    )
    output.add_argument("--texts", type=str | None, metavar="FILE", help="texts to compare on, one a line")
    output.add_argument("--progress", type=bool, default=True, help="progress bar")
    card = options.add_argument_group("Model card and hub")
    card.add_argument("--results", type=str | None, metavar="FOLDER", help="result files of evaluate.py, for the card")
    card.add_argument("--title", type=str | None, help="of the card (default: the name on the hub, or the folder's)")
    card.add_argument("--license", type=str | None, help="identifier of the hub's list, such as apache-2.0")
    card.add_argument("--push_to_hub", "--push-to-hub", type=str | None, metavar="NAME", help="organisation/name")
    card.add_argument("--private", action="store_true", help="make a new repository on the hub a private one")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Export a model and print the folder.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake in the arguments, printed in one line.
    """
    return run_command(parser(), _run, argv)


def _check(options: Any) -> None:
    """Check the options before the slow imports. Raises: ValueError: a mistake in them."""
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
    if options.adapter_only and options.truncate_dim is not None:
        raise ValueError(
            f"--truncate_dim {options.truncate_dim}: an adapter is written whole; leave it out, and give truncate_dim "
            "to encode or evaluate.py"
        )
    if options.private and options.push_to_hub is None:
        raise ValueError("--private is for --push_to_hub NAME; give both or neither")
    from ullme.commands.export.folder import check_target

    check_target(Path(options.to))


def _run(options: Any) -> int:
    _check(options)
    _silence_libraries()
    from ullme.commands.export import hub
    from ullme.commands.export.check import need_sentence_transformers
    from ullme.commands.export.job import check_limits, export_adapter, export_model
    from ullme.commands.export.model_card import Description, write_card
    from ullme.commands.export.scores import read_scores
    from ullme.commands.export.source import Source, find_source
    from ullme.commands.export.texts import read_texts
    from ullme.models.checkpoint import load_embedder, usable_device

    if options.adapter_only:
        warn_of_unused(parser(), options, {"with --adapter_only": ("tolerance", "max_length")})
    else:
        need_sentence_transformers()  # this and the limits before an LLM is loaded
        check_limits(options.dtype, options.max_length, options.tolerance)
    if options.push_to_hub is not None:
        hub.check_push(options.push_to_hub)
    texts = read_texts(options.texts)
    scores = [] if options.results is None else read_scores(options.results)
    source = Source() if options.run is None else find_source(options.run)
    title = options.title or options.push_to_hub or Path(options.to).resolve().name
    what = Description(title, source, scores, options.license)
    device = usable_device(options.device)
    dtype, loading = _dtypes(options, source, device.split(":")[0])
    model = load_embedder(options.model, source.checkpoint, {**_model_options(options, source), **loading})
    model.to(device)

    def describe(folder: Path, done: Exported) -> None:
        write_card(folder, model, done, what)

    common: dict[str, Any] = {"texts": texts, "extra": describe, "show_progress_bar": options.progress}
    if options.adapter_only:
        done = export_adapter(model, options.to, **common)
    else:
        names = ("max_length", "tolerance", "truncate_dim")
        limits: dict[str, Any] = {"dtype": dtype, **{name: options[name] for name in names}}
        done = export_model(model, options.to, **limits, **common)
    print(_summary(done))
    if options.push_to_hub is not None:
        print(f"uploaded to {hub.push(done.folder, options.push_to_hub, options.private)}")
    return 0


def _dtypes(options: Any, source: Source, device: str) -> tuple[str, dict[str, str]]:
    """The dtype to write, and the option of the dtype to load: float32 where a CPU would be slow in the LLM's own."""
    from ullme.commands.loading_dtype import dtype_to_load, known_dtype

    if dtype_to_load(options.model, source.checkpoint, None, device) is None:
        return options.dtype, {}
    own = known_dtype(options.model, source.checkpoint) or "auto"
    return own if options.dtype == "auto" else options.dtype, {"dtype": "float32"}


def _model_options(options: Any, source: Source) -> dict[str, Any]:
    """The options to load the model with. Raises: ValueError: a run on a quantised LLM, without --quantization."""
    if source.quantization != "none" and options.quantization is None:
        raise ValueError(
            f"the run was trained on a quantised LLM (quantization={source.quantization}), into which an adapter "
            "cannot be merged; --quantization none merges it into the LLM as stored, on which it was not trained, so "
            "that embeddings differ a little: evaluate the exported folder"
        )
    given = {name: options[name] for name in _FROM_EVALUATION if name != "device" and options[name] is not None}
    prompts = {field: options[name] for name, (field, *_) in PROMPT_OPTIONS.items() if options[name] is not None}
    # a few texts are embedded once, without gradients
    fixed = {"compile": False, "gradient_checkpointing": False}
    return {**fixed, **given, **({"prompts": prompts} if prompts else {})}


def _summary(done: Exported) -> str:
    if done.layout is None:
        return f"{done.folder}: the adapter; loaded by PEFT its logits differ by at most {done.loaded:.0e}"
    return (
        f"{done.folder}: {done.dtype}, up to {done.max_length} tokens, {done.dimensions} dimensions\n"
        f"  merged = adapter to {done.merged:.0e}; {done.dtype} costs 1 - cosine {done.rounded:.0e}; "
        f"sentence-transformers = ullme to {done.loaded:.0e}"
    )


def _silence_libraries() -> None:
    """Silence the warnings and progress bars of all libraries."""
    warnings.filterwarnings("ignore")
    for library in ("transformers", "sentence_transformers", "huggingface_hub", "peft"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
