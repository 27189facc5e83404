"""The command line of ``ullme encode``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentParser

from ullme.commands.corpus_options import add_corpus_options, open_chosen_corpus
from ullme.commands.evaluate import MODEL_OPTIONS, PROMPT_OPTIONS
from ullme.utils.errors import run_command
from ullme.utils.unused_options import warn_of_unused

if TYPE_CHECKING:
    from ullme.search.corpus import Corpus, CorpusPlan
    from ullme.search.embedder import TextEmbedder
    from ullme.search.encode import Encoded, EncodeSettings
    from ullme.search.ray_engine import ActorPool

DESCRIPTION = (
    "Embed a corpus into a folder of shards: memory-mapped vectors with their ids and texts, and a manifest that says "
    "by which model and prompts. `ullme search` searches it. A command that was stopped goes on where it was when it "
    "is given again. Several GPUs: torchrun --nproc-per-node N -m ullme encode ..., --shard I/N in each job of a "
    "SLURM array, or --engine ray on a Ray cluster; all write the same shards."
)
# Options of MODEL_OPTIONS that say how the model is used, not how it is loaded.
_NOT_LOADING = ("device", "max_length", "truncate_dim")


def parser() -> ArgumentParser:
    """The options; every one may also stand in a YAML file given with --config."""
    options = ArgumentParser(prog="ullme encode", description=DESCRIPTION, exit_on_error=False)
    options.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these options")
    options.add_argument(
        "model", nargs="?", type=str | None, help="run folder, LLM, PEFT adapter or sentence-transformers model"
    )
    options.add_argument("--to", type=str | None, metavar="FOLDER", help="a new folder, or one to go on in")
    add_corpus_options(options)
    stored = options.add_argument_group("Embeddings")
    stored.add_argument("--role", type=str, default="passage", help="prompt template: passage or query")
    stored.add_argument("--precision", type=str, default="float32", help="of the vectors: float32, float16 or int8")
    stored.add_argument("--shard_rows", type=int | None, help="documents in a shard (default: 16384)")
    model = options.add_argument_group("Model")
    for name, (type_, text) in MODEL_OPTIONS.items():
        model.add_argument(f"--{name}", type=type_ | None, help=text)
    for name, (_, type_, text) in PROMPT_OPTIONS.items():
        help_ = "for a template with {instruction}" if name == "instruction" else text
        model.add_argument(f"--{name}", type=type_ | None, help=f"{help_} (default: the run's)")
    work = options.add_argument_group("Work")
    work.add_argument("--batch_size", type=int | None, help="texts of average length in a forward (default: by device)")
    work.add_argument("--shard", type=str | None, metavar="I/N", help="write only every Nth shard, from number I on")
    work.add_argument("--progress", type=bool, default=True, help="progress bar")
    work.add_argument("--engine", type=str, default="local", help="local, or ray: pip install 'ullme[ray]'")
    ray = options.add_argument_group("Ray, with --engine ray")
    ray.add_argument("--ray_address", type=str | None, help="of the cluster (default: the one here, or a new one)")
    ray.add_argument("--actors", type=int | None, help="workers at the most (default: as many as there is room for)")
    ray.add_argument("--actor_cpus", type=int, default=1, help="CPUs of a worker")
    ray.add_argument("--actor_gpus", type=float | None, help="GPUs of a worker (default: 1, or 0 where there are none)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Encode a corpus.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake in the arguments or the corpus, printed in one line; 130 after Ctrl-C.
    """
    return run_command(
        parser(), _run, argv, "the shards that were written stay; the same command goes on with the others"
    )


def _run(options: Any) -> int:
    """Check what can be checked without the model, then encode."""
    if options.model is None:
        raise ValueError(
            "nothing to encode with: name a run folder, an LLM, an adapter or a sentence-transformers model"
        )
    if options.corpus is None or options.to is None:
        raise ValueError("give --corpus FILE, FOLDER or DATASET, and --to FOLDER")
    from ullme.search.corpus import SHARD_ROWS, check_corpus
    from ullme.search.shards import check_folder
    from ullme.utils.atomic_files import check_writable

    encode = _engine(options)
    check_folder(Path(options.to))
    check_writable(Path(options.to).absolute().parent, "--to")
    corpus = open_chosen_corpus(options)
    plan = check_corpus(corpus, SHARD_ROWS if options.shard_rows is None else options.shard_rows)
    _print_empty(corpus, plan)
    done = encode(corpus, plan)
    state = "all shards are there" if done.finished else "other shards are still missing"
    written = sum(plan.shards[number].rows for number in done.written)
    print(f"{options.to}: {written} of {plan.documents} documents encoded by this command; {state}")
    return 0


def _engine(options: Any) -> Callable[[Corpus, CorpusPlan], Encoded]:
    """What encodes a checked corpus. Raises: ValueError: a mistake in the options, or Ray is not installed."""
    from ullme.search.encode import own_part

    settings = _settings(options)
    part = own_part(options.shard)
    if options.engine == "local":
        only_ray = ("ray_address", "actors", "actor_cpus", "actor_gpus")
        warn_of_unused(parser(), options, {"with --engine local": only_ray})
        return partial(_encode_here, options, settings, part)
    if options.engine != "ray":
        raise ValueError(f"--engine {options.engine}: choose local or ray")
    from ullme.search.ray_engine import ActorPool, import_ray

    pool = ActorPool(options.ray_address, options.actors, options.actor_cpus, options.actor_gpus)
    pool.check()
    if part != (0, 1):
        raise ValueError("--engine ray divides the work itself; start it once, without --shard and without torchrun")
    if options.device is not None:
        raise ValueError("--engine ray chooses the devices; leave --device out, and give --actor_gpus 0 to use CPUs")
    import_ray()
    return partial(_encode_on_ray, options, settings, pool)


def _encode_here(
    options: Any, settings: EncodeSettings, part: tuple[int, int], corpus: Corpus, plan: CorpusPlan
) -> Encoded:
    """In this process, which may be one of several."""
    from ullme.search.encode import encode_corpus, local_device

    embedder, model_options = load_model(options.model, options.device or local_device(), *_loading(options))
    return encode_corpus(
        embedder,
        corpus,
        options.to,
        settings,
        plan=plan,
        model_name=stored_name(options.model),
        model_options=model_options,
        part=part,
        show_progress_bar=options.progress and part[0] == 0,
    )


def _encode_on_ray(
    options: Any, settings: EncodeSettings, pool: ActorPool, corpus: Corpus, plan: CorpusPlan
) -> Encoded:
    """In the actors of a Ray cluster."""
    from ullme.search.ray_engine import encode_corpus_on_ray

    load = partial(load_model, stored_name(options.model), None, *_loading(options))
    return encode_corpus_on_ray(
        load,
        corpus,
        plan,
        options.to,
        settings,
        model_name=stored_name(options.model),
        pool=pool,
        show_progress_bar=options.progress,
    )


def _settings(options: Any) -> EncodeSettings:
    from ullme.search.encode import EncodeSettings

    names = ("role", "instruction", "max_length", "precision", "truncate_dim", "batch_size")
    settings = EncodeSettings(**{name: options[name] for name in names})
    settings.check()
    return settings


def _print_empty(corpus: Corpus, plan: Any) -> None:
    number, what = (plan.skipped, "left out") if plan.skipped else (plan.empty, "embedded as the end token")
    if number:
        print(f"encode: {number} documents of {corpus.name} have no text and are {what}", file=sys.stderr)


def _loading(options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of loading, and the prompts, that were given."""
    given = {name: options[name] for name in MODEL_OPTIONS if name not in _NOT_LOADING}
    prompts = {field: options[name] for name, (field, *_) in PROMPT_OPTIONS.items() if name != "instruction"}
    return given, {k: v for k, v in prompts.items() if v is not None}


def load_model(
    name: str, device: str | None, given: dict[str, Any], prompts: dict[str, Any]
) -> tuple[TextEmbedder, dict[str, Any]]:
    """Load a model, on a CPU that is slow in half precision in float32, without the messages of libraries.

    Returns:
        The model, and the options with which :func:`~ullme.search.embedder.load_text_embedder` loads it again.
    """
    from ullme.commands.evaluate import silence_libraries
    from ullme.commands.loading_dtype import dtype_to_load
    from ullme.models.checkpoint import usable_device
    from ullme.search.embedder import is_checkpoint, load_text_embedder
    from ullme.utils.allocator import keep_freed_memory

    silence_libraries()
    device = usable_device(device)
    keep_freed_memory(device)
    options = {key: value for key, value in given.items() if value is not None}
    model, checkpoint = (None, name) if is_checkpoint(name) else (name, None)
    dtype = dtype_to_load(model, checkpoint, options.get("dtype"), device.split(":")[0])
    if dtype is not None:
        options["dtype"] = dtype
    if prompts:
        options["prompts"] = prompts
    return load_text_embedder(name, device=device, **options), options


def stored_name(name: str) -> str:
    """A model's name for the manifest: the absolute path, if it is a path."""
    return str(Path(name).resolve()) if Path(name).exists() else name
