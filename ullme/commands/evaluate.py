"""The command line of evaluation: ``evaluate.py`` and ``ullme evaluate``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentParser

from ullme.eval.quantized import check_precision
from ullme.utils.errors import run_command

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from ullme.models import WrappedULLME

DESCRIPTION = "Evaluate an LLM, a trained checkpoint or a sentence-transformers model on MTEB tasks and local files."
# Options that are passed on to WrappedULLME when given: name -> (type, help).
MODEL_OPTIONS: dict[str, tuple[type, str]] = {
    "model_backbone_type": (str, "transformers' model_type; checked if given"),
    "lora_name": (str, "name of the adapter (default: the checkpoint's)"),
    "lora_r": (int, "rank of LoRA (default: the checkpoint's)"),
    "lora_alpha": (float, "scale of LoRA (default: the checkpoint's)"),
    "pooling": (str, "mean, weighted_mean, first, last, or the dotted path of a function of yours"),
    "family_code": (str, "a module of yours that registers a model type with transformers"),
    "attention": (str, "bidirectional or causal"),
    "dtype": (
        str,
        "of the weights: auto (as stored, but float32 on a CPU that is slow in half precision), float32, bfloat16 or "
        "float16",
    ),
    "quantization": (str, "nf4, int8 or none (default: the checkpoint's)"),
    "device": (str, "such as cuda:0 or cpu (default: a GPU if there is one)"),
    "max_length": (int, "in tokens, prompt template included (default: 512)"),
    "truncate_dim": (int, "keep so many of an embedding's first dimensions (default: all)"),
}
PROMPT_OPTIONS: dict[str, tuple[str, type, str]] = {
    "query_prompt": ("query", str, "template of a query, with {text} and {instruction}"),
    "passage_prompt": ("passage", str, "template of a passage, with {text}"),
    "instruction": ("instruction", str, "the task instruction, where an mteb task has none"),
    "pooled": ("pooled", str, "which tokens become the embedding: all, or text (its last copy, and what follows)"),
    "append_eos": ("append_eos", bool, "end every text with the end token"),
}
LOCAL_OPTIONS = {
    "corpus": ("FOLDER", "BEIR layout: corpus.jsonl, queries.jsonl, qrels/test.tsv"),
    "reranking": ("FILE", "JSON lines of query, pos, neg"),
    "sts": ("FILE", "sentence1, sentence2, score: tab-separated, .csv or JSON lines"),
    "pair_classification": ("FILE", "JSON lines of sentence1, sentence2, label 0 or 1"),
    "classification": ("FOLDER", "train.jsonl and test.jsonl of text, label"),
    "clustering": ("FILE", "JSON lines of text, label"),
}


def parser() -> ArgumentParser:
    """The options; every one may also stand in a YAML file given with --config."""
    options = ArgumentParser(prog="ullme evaluate", description=DESCRIPTION, exit_on_error=False)
    options.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these options")
    model = options.add_argument_group("Model")
    model.add_argument("--model", type=str | None, help="hub name or folder: LLM, LoRA adapter, sentence-transformers")
    model.add_argument("--checkpoint", type=str | None, help="run folder, Lightning checkpoint or adapter folder")
    for name, (type_, text) in MODEL_OPTIONS.items():
        model.add_argument(f"--{name}", type=type_ | None, help=text)
    for name, (_, type_, text) in PROMPT_OPTIONS.items():
        model.add_argument(f"--{name}", type=type_ | None, help=f"{text} (default: the checkpoint's)")
    model.add_argument(
        "--precision", type=str, default="float32", help="of the embeddings: float32, int8, uint8 or binary"
    )
    model.add_argument(
        "--use_task_instructions", type=bool, default=True, help="false: use --instruction for every task"
    )
    model.add_argument("--instructions", type=dict[str, str], default={}, help="instruction by mteb task name or type")
    tasks = options.add_argument_group("Tasks")
    tasks.add_argument("--tasks", nargs="+", type=str, default=[], help='mteb tasks or benchmarks ("MTEB(eng, v1)")')
    tasks.add_argument(
        "--langs", nargs="+", type=str, default=[], help="ISO 639-3 codes to keep of --tasks (default: all)"
    )
    for name, (metavar, text) in LOCAL_OPTIONS.items():
        tasks.add_argument(f"--{name}", nargs="+", type=str, default=[], metavar=metavar, help=text)
    output = options.add_argument_group("Output")
    output.add_argument("--output", type=str, default="results", help="folder of mteb's result files")
    output.add_argument("--overwrite", action="store_true", help="recompute existing results")
    output.add_argument("--scores", type=str | None, metavar="FILE", help="write the table as JSON too")
    output.add_argument(
        "--per_query", type=str | None, metavar="FOLDER", help="write TASK.json with each query's score (retrieval)"
    )
    output.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    output.add_argument("--wandb", type=str | None, metavar="PROJECT", help="log scores and table to this W&B project")
    output.add_argument("--batch_size", type=int | None, help="texts in a forward (default: by device)")
    output.add_argument("--progress", type=bool, default=True, help="progress bars")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print a table.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0; 1 where a task could not be evaluated; 2 for a mistake in the arguments, in one line;
        130 after Ctrl-C.
    """
    return run_command(parser(), _run_until_ctrl_c, argv)


def _run_until_ctrl_c(options: Any) -> int:
    try:
        _check(options)
        return _run(options)
    except KeyboardInterrupt:
        done = f"finished tasks are in {options.output}; the same command goes on with the others"
        print(f"\nCtrl-C: {done}", file=sys.stderr)
        return 130


def _check(options: Any) -> None:
    """Check the options before the slow imports. Raises: ValueError: a mistake in them."""
    if options.model is None and options.checkpoint is None:
        raise ValueError("nothing to evaluate: give --model NAME_OR_FOLDER, --checkpoint RUN, or both")
    if not options.tasks and not any(options[name] for name in LOCAL_OPTIONS):
        local = ", ".join(f"--{name} {metavar}" for name, (metavar, _) in LOCAL_OPTIONS.items())
        raise ValueError(f"nothing to evaluate on: give --tasks NAME ..., or local data with {local}")
    check_precision(options.precision)
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch_size {options.batch_size} must be at least 1")
    if options.checkpoint is not None and not Path(options.checkpoint).exists():
        raise ValueError(f"--checkpoint {options.checkpoint} does not exist; give a run folder or a checkpoint file")
    if options.langs and not options.tasks:
        raise ValueError(
            f"--langs {' '.join(options.langs)} keeps languages of --tasks, and none are given; leave it out"
        )
    from ullme.utils.atomic_files import check_writable  # which imports torch

    if options.wandb is not None and os.environ.get("RANK", "0") == "0":  # only the first process logs
        from ullme.utils.wandb_login import check_wandb_login

        check_wandb_login(f"--wandb {options.wandb}", "leave --wandb out")
    check_writable(Path(options.output), "--output")
    for option in ("scores", "per_query"):
        if options[option] is not None:
            place = Path(options[option])
            check_writable(place if option == "per_query" else place.absolute().parent, f"--{option}")


def _run(options: Any) -> int:
    """Evaluate; with several processes on the first, while the others embed for it."""
    silence_libraries()
    from ullme.distributed import leave_process_group, world
    from ullme.eval import ranks

    ranks.join()
    with redirect_stdout(sys.stderr):  # keep the output of libraries out of the table
        tasks, model = ranks.on_every_rank(lambda: _tasks_and_model(options))
    if world()[0] > 0:
        ranks.serve(model.model)
        status = 0
    else:
        if world()[1] > 1:
            model.model.embed_blocks = ranks.embed_over_ranks
        status = _evaluate(options, tasks, model)
        ranks.stop_serving()
    leave_process_group()
    return status


def _evaluate(options: Any, tasks: list[AbsTask], model: WrappedULLME) -> int:
    from ullme.eval.mteb import evaluate_tasks
    from ullme.eval.per_query import keep_per_query
    from ullme.eval.quantized import compressed
    from ullme.eval.table import markdown_table, text_table, write_rows
    from ullme.eval.wandb import wandb_run

    encoder = compressed(model, options.precision)
    meta = encoder.mteb_model_meta
    print(f"{meta.name}, revision {meta.revision}", file=sys.stderr)
    queries = {} if options.per_query is None else keep_per_query(tasks, options.per_query)
    given = {name: value for name, value in options.as_dict().items() if value not in (None, [], {})}
    kept = {**given, "config": None, "revision": meta.revision}
    with redirect_stdout(sys.stderr), wandb_run(options.wandb, options.checkpoint, kept, options.output) as log:
        rows = evaluate_tasks(
            encoder,
            tasks,
            output=options.output,
            overwrite=options.overwrite,
            batch_size=options.batch_size,
            show_progress_bar=options.progress,
        )
        log(rows)
    print(markdown_table(rows) if options.markdown else text_table(rows))
    if options.scores is not None:
        write_rows(rows, options.scores)
    failed = [row for row in rows if row.error is not None]
    if unwritten := [name for name in queries.keys() - {row.task for row in failed} if not queries[name]]:
        print(
            f"evaluate: --per_query {options.per_query}: nothing is written for {', '.join(sorted(unwritten))}, whose "
            f"results are in {options.output} already; --overwrite computes them again",
            file=sys.stderr,
        )
    if failed:
        print(
            f"evaluate: {len(failed)} of {len(rows)} tasks failed; the same command tries them again", file=sys.stderr
        )
    for row in failed:
        print(f"evaluate: {row.error}", file=sys.stderr)
    return 1 if failed else 0


def _tasks_and_model(options: Any) -> tuple[list[AbsTask], WrappedULLME]:
    """The tasks first, since they are sooner found to be wrong."""
    from ullme.eval.mteb import check_instructions

    tasks = _tasks(options)
    options.instructions = check_instructions(options.instructions, tasks)
    return tasks, _model(options)


def _tasks(options: Any) -> list[AbsTask]:
    from ullme.eval import local_tasks
    from ullme.eval.mteb import find_tasks

    make: dict[str, Callable[[str], AbsTask]] = {
        "corpus": local_tasks.retrieval_task,
        "reranking": local_tasks.reranking_task,
        "sts": local_tasks.sts_task,
        "pair_classification": local_tasks.pair_classification_task,
        "classification": local_tasks.classification_task,
        "clustering": local_tasks.clustering_task,
    }
    local = [make[name](path) for name in LOCAL_OPTIONS for path in options[name]]
    return [*find_tasks(options.tasks, options.langs), *local]


def _model(options: Any) -> WrappedULLME:
    from ullme.eval.ranks import own_device
    from ullme.models import WrappedULLME
    from ullme.models.checkpoint import usable_device
    from ullme.utils.allocator import keep_freed_memory

    _warn_of_unused(options)
    given = {name: options[name] for name in MODEL_OPTIONS if options[name] is not None}
    if (device := own_device()) is not None:
        given.setdefault("device", device)
    keep_freed_memory(usable_device(given.get("device")))
    if (dtype := _dtype(options, given.get("device"))) is not None:
        given["dtype"] = dtype
    prompts = {field: options[name] for name, (field, *_) in PROMPT_OPTIONS.items() if options[name] is not None}
    if prompts:
        given["prompts"] = prompts
    model = WrappedULLME(
        options.model,
        model_checkpoint=options.checkpoint,
        use_task_instructions=options.use_task_instructions,
        instructions=options.instructions,
        **given,
    )
    _warn_of_unread_instructions(options, model)
    return model


def _warn_of_unused(options: Any) -> None:
    """Name the options that the kind of the model makes useless."""
    from ullme.models.loading import adapter_folder, is_sentence_transformer
    from ullme.utils.unused_options import warn_of_unused

    if options.checkpoint is not None:
        return
    unused: dict[str, tuple[str, ...]] = {}
    adapter = ("lora_name", "lora_r", "lora_alpha")
    if is_sentence_transformer(options.model):
        own = (*adapter, "model_backbone_type", "use_task_instructions", "instructions")
        unused["by a sentence-transformers model, which has prompts of its own"] = own
    elif any(options[name] is not None for name in adapter) and adapter_folder(options.model) is None:
        unused["without a checkpoint or an adapter"] = adapter
    warn_of_unused(parser(), options, unused)


def _warn_of_unread_instructions(options: Any, model: WrappedULLME) -> None:
    """Name the instructions that were given for templates without a place for them."""
    from ullme.distributed import world

    if model.delegate is not None or world()[0] > 0:
        return
    prompts = model.model.prompts
    if "{instruction}" not in prompts.query + prompts.passage:
        for name in ("instruction", "instructions"):
            if options[name]:
                print(
                    f"evaluate: --{name} {options[name]} is not used: the query template {prompts.query!r} has no "
                    "{instruction}",
                    file=sys.stderr,
                )


def _dtype(options: Any, device: str | None) -> str | None:
    """The dtype to load the weights in. Says so where it is another than asked for, and warns of a slow one."""
    from ullme.commands.loading_dtype import dtype_to_load
    from ullme.distributed import world
    from ullme.models.checkpoint import usable_device
    from ullme.utils.precision import cpu_rates, slow_choice

    kind = usable_device(device).split(":")[0]
    dtype = dtype_to_load(options.model, options.checkpoint, options.dtype, kind)
    message = slow_choice("--dtype", dtype, kind)
    if dtype != options.dtype:
        message = f"--dtype: the weights are loaded in float32 (this CPU does {cpu_rates()})"
    if message and world()[0] == 0:
        print(f"evaluate: {message}", file=sys.stderr)
    return dtype


def silence_libraries() -> None:
    """Silence the warnings and progress bars of all libraries but mteb's bars."""
    warnings.filterwarnings("ignore")
    for library in ("mteb", "transformers", "sentence_transformers", "datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
