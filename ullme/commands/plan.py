"""The command line of ``ullme plan``: memory and hours of a run of train.py, and of the paper's three backbones."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullme.planning.devices import DEVICES, number_of, this_cpu
from ullme.utils.errors import explain_permission, print_error

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ullme.data.datamodule import ULLMEDataModule
    from ullme.models.config import BackboneConfig
    from ullme.planning.plan import Job, Plan
    from ullme.prompts import Prompts

# Published shapes, for planning without the hub: name -> (model type, fields of config.json).
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "microsoft/phi-1_5": (
        "phi",
        {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "intermediate_size": 8192}
        | {"vocab_size": 51_200, "max_position_embeddings": 2048, "dtype": "float16"},
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": (
        "mistral",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"intermediate_size": 14_336, "vocab_size": 32_000, "max_position_embeddings": 32_768, "dtype": "bfloat16"}
        | {"sliding_window": None},
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"intermediate_size": 14_336, "vocab_size": 128_256, "max_position_embeddings": 8192, "dtype": "bfloat16"},
    ),
}
# arXiv 2408.03402, section 4.1: days on four A100.
PAPER_DAYS = {
    "microsoft/phi-1_5": 1.5,
    "mistralai/Mistral-7B-Instruct-v0.2": 5,
    "meta-llama/Meta-Llama-3-8B-Instruct": 6,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; the exit status is 0 if it fits, 1 if not, 2 for a mistake in the arguments."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings(
        "ignore", "LightningCLI's args parameter"
    )  # its arguments are only a part of the command line
    arguments, overrides = parser().parse_known_args(argv)
    try:
        if arguments.paper:
            print(paper_table(arguments.utilisation))
            return 0
        plan, datasets = plan_from(arguments, overrides)
    except (ValueError, argparse.ArgumentError) as error:
        return print_error(error)
    except PermissionError as error:
        return print_error(explain_permission(error))
    print(describe(plan, datasets))
    return 0 if plan.fits else 1


def parser() -> argparse.ArgumentParser:
    """The options; unknown ones override the configuration's."""
    options = argparse.ArgumentParser(
        "ullme plan",
        description="Predict memory and hours of a run, without weights or a device. Exit status: 0 if it fits, 1 if "
        "not.",
        epilog="Further options override the configuration's, as they do for train.py: --data.batch_size=256.",
    )
    add = options.add_argument
    add("--config", action="append", default=[], help="a configuration of train.py; several are stacked")
    add(
        "--device",
        choices=["cpu", *sorted(DEVICES)],
        default="a100-80gb",
        help="device to plan for (default: a100-80gb); cpu is this machine's, at its measured speed",
    )
    add("--num_devices", "--num-devices", type=int, help="number of devices (default: the trainer's, or 1)")
    add("--strategy", choices=("ddp", "fsdp"), help="default: trainer.strategy")
    add(
        "--utilisation",
        type=float,
        help="assumed share of the device's peak FLOP/s, recomputation included (default: predicted from matrix "
        "products and memory traffic; of a CPU 0.75)",
    )
    add("--rows", type=int, help="queries in an epoch (default: data.max_rows, or the lines of local files)")
    add(
        "--backbone_config",
        "--backbone-config",
        metavar="FILE",
        help=f"config.json of the LLM, or one of {', '.join(SHAPES)}",
    )
    add(
        "--query_tokens",
        "--query-tokens",
        type=float,
        default=10,
        help="tokens of an average query without template (default: 10, as MS MARCO's)",
    )
    add(
        "--passage_tokens",
        "--passage-tokens",
        type=float,
        default=75,
        help="tokens of an average passage (default: 75, as MS MARCO's)",
    )
    add("--paper", action="store_true", help="print a table of the paper's three backbones; needs no configuration")
    return options


def plan_from(arguments: argparse.Namespace, overrides: Sequence[str]) -> tuple[Plan, list[tuple[str, Plan]]]:
    """Make the plan of a command line, and those of its datasets, if it trains on several.

    Raises:
        ValueError: a mistake in it.
    """
    from ullme.commands.train import read_configs
    from ullme.planning.plan import make_plan

    if not arguments.config:
        raise ValueError("--config: give at least one configuration of train.py, or --paper")
    for name in ("rows", "query_tokens", "passage_tokens"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    kind = "cpu" if arguments.device == "cpu" else "cuda"
    config = read_configs([*(f"--config={path}" for path in arguments.config), *overrides], device=kind)
    strategy = config.trainer.strategy
    named = strategy if isinstance(strategy, str) else strategy.class_path
    fsdp = arguments.strategy == "fsdp" or (
        arguments.strategy is None and any(word in named.lower() for word in ("fsdp", "modelparallel"))
    )
    data_module(config.data)  # refuses what a run refuses
    job = job_from_config(config, arguments)
    count = _devices_of(config.trainer) if arguments.num_devices is None else arguments.num_devices
    device = this_cpu(job.half) if kind == "cpu" else DEVICES[arguments.device]
    plan = make_plan(job, device, count, fsdp, arguments.utilisation)
    return plan, [] if arguments.rows else dataset_plans(plan, config.data)


def dataset_plans(plan: Plan, data: Any) -> list[tuple[str, Plan]]:
    """The files and the plan of each of ``data.datasets``: its own terms and passages, in the chunks of the run.

    Args:
        plan: of the run, with all terms and the most passages.
        data: the options under ``data:``.
    """
    from ullme.planning.plan import plan_alike
    from ullme.planning.rows import dataset_shares

    plans = []
    for share in dataset_shares(data):
        objective = plan.job.objective.of_terms(share.terms)
        candidates, extra = 1 + share.negatives, share.positives - 1
        job = replace(plan.job, objective=objective, rows=share.rows, candidates=candidates, extra_positives=extra)
        plans.append((share.name, plan_alike(plan, job)))
    return plans


def _devices_of(trainer: Any) -> int:
    """The number of processes of a run; with trainer.devices=auto one for each node."""
    devices = number_of(trainer.devices)
    return trainer.num_nodes * (devices if isinstance(devices, int) else 1)


def data_module(data: Any, **changes: Any) -> ULLMEDataModule:
    """The data module of a configuration, which has read nothing yet.

    Args:
        data: the options under ``data:``.
        **changes: options to replace.

    Raises:
        ValueError: options that a run would refuse.
    """
    from ullme.data.datamodule import ULLMEDataModule
    from ullme.data.mixture import TrainSet

    options = {**data.as_dict(), **changes}
    if data.datasets is not None:
        options["datasets"] = [TrainSet(**vars(one)) for one in data.datasets]
    return ULLMEDataModule(**options)


def job_from_config(config: Any, arguments: argparse.Namespace) -> Job:
    """The job that a configuration trains. Raises: ValueError: the LLM or the number of rows is not known."""
    from jsonargparse import ArgumentParser, Namespace

    from ullme.callbacks import FullBatch, LossCallback
    from ullme.models.config import BackboneConfig
    from ullme.planning.plan import Job
    from ullme.planning.rows import epoch_rows, most_passages
    from ullme.prompts import Prompts

    options = BackboneConfig(**config.model.backbone.as_dict())
    prompts = Prompts(**config.model.prompts.as_dict())
    chosen = config.loss.clone()
    frozen_copy = chosen.init_args.pop("reference", None) == "frozen_copy"
    chosen.init_args.pop("cache_reference", None)  # instantiating the loss would open it
    parser = ArgumentParser()
    parser.add_subclass_arguments(LossCallback, "loss")
    loss = parser.instantiate_classes(parser.parse_object(Namespace(loss=chosen))).loss
    tokens = getattr(loss, "chunk_tokens", None)
    data = config.data
    negatives, positives = most_passages(data)
    return replace(
        Job(options, _llm_config(options, arguments.backbone_config), loss.objective),
        batch_size=data.batch_size,
        candidates=1 + negatives,
        extra_positives=positives - 1,
        rows=arguments.rows or epoch_rows(data),
        query_tokens=arguments.query_tokens + _template_tokens(prompts, "query"),
        prompt_tokens=arguments.query_tokens + _template_tokens(prompts, "generation"),
        passage_tokens=arguments.passage_tokens + _template_tokens(prompts, "passage"),
        bare_query_tokens=arguments.query_tokens,
        query_template_tokens=_template_tokens(prompts, "query_generation"),
        query_max_length=data.query_max_length,
        passage_max_length=data.passage_max_length,
        chunk_size=getattr(loss, "chunk_size", None),
        chunk_tokens=tokens if isinstance(tokens, int) else None,
        full_batch=isinstance(loss, FullBatch),
        frozen_copy=frozen_copy,
        half=str(config.trainer.precision).startswith("bf16") or options.dtype == "bfloat16",
    )


def _template_tokens(prompts: Prompts, role: Any) -> int:
    """Estimated at 4.5 characters a token, as in English."""
    return math.ceil(len("".join(prompts.around(role))) / 4.5)


def _llm_config(options: BackboneConfig, given: str | None) -> PretrainedConfig:
    """The LLM's config from, in this order, ``--backbone_config``, its folder, the hub, or the published shapes."""
    from transformers import AutoConfig

    from ullme.models.loading import load_config

    if given is not None and given not in SHAPES:
        if not Path(given).exists():
            raise ValueError(f"--backbone_config={given}: no such file; give a config.json or one of {sorted(SHAPES)}")
        return AutoConfig.from_pretrained(given)
    name = given or options.model_name_or_path
    if given is None:
        try:
            return load_config(replace(options, quantization="none"))  # which would ask for a GPU
        except ValueError as error:
            if name not in SHAPES:
                raise ValueError(f"{error}; or give --backbone_config") from error
    kind, sizes = SHAPES[name]
    return AutoConfig.for_model(kind, **sizes)


def describe(plan: Plan, datasets: Sequence[tuple[str, Plan]] = ()) -> str:
    """The plan as lines of text for the terminal.

    Args:
        plan: of the run; with several datasets, of a step with all terms and the most passages.
        datasets: as :func:`dataset_plans` gives them.
    """
    from ullme.planning.memory import GIB

    job, memory = plan.job, plan.memory
    room = plan.device.memory_gib
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in vars(memory).items() if size >= 0.05 * GIB)
    verdict = "fits" if plan.fits else f"does NOT fit ({plan.usable_memory / GIB:.1f} of {room:.1f} GiB is usable)"
    strategy = ("fsdp" if plan.fsdp else "ddp") if plan.num_devices > 1 else "one device"
    chunk = (
        f"{job.chunk_size} queries" if job.chunk_size else f"{job.chunk_tokens:,} tokens" if job.chunk_tokens else "all"
    )
    checkpointing = "on" if job.options.gradient_checkpointing else "off"
    lines = {
        "model": f"{job.options.model_name_or_path}: {plan.weights / 1e9:.2f} B weights, "
        f"{plan.trained / 1e6:.1f} M trained",
        "step": f"{job.batch_size} queries x {job.candidates + job.extra_positives} passages; "
        f"{job.query_tokens:.0f} tokens a query, "
        f"{job.passage_tokens:.0f} a passage",
        "devices": f"{plan.num_devices} x {plan.device.name}, {strategy}",
        "chunks": f"{plan.chunks} of {chunk}, gradient checkpointing {checkpointing}",
        "memory": f"{memory.total / GIB:.1f} of {room:.1f} GiB a device: {verdict}",
        "": f"({parts})",
        "time": f"{plan.seconds:.2f} s a step, {plan.hours:.2f} hours an epoch of {plan.steps} steps, "
        f"at {plan.utilisation:.0%} of the device's peak (model FLOPs utilisation {plan.mfu:.0%})",
    }
    if datasets:
        hours, steps = (sum(getattr(one, name) for _, one in datasets) for name in ("hours", "steps"))
        mean = f"{3600 * hours / steps:.2f} s a step on average"
        lines["time"] = f"{hours:.2f} hours an epoch of {steps} steps, {mean}:"
        lines["time"] += "".join(f"\n{'':10}{name}: {_dataset_line(one)}" for name, one in datasets)
    elif len(plan.parts) > 1:
        part, seconds = max(plan.parts.items(), key=lambda item: item[1])
        shares = ", ".join(f"{name} {value:.2f} s" for name, value in plan.parts.items())
        lines["limit"] = f"{part}, {seconds / plan.seconds:.0%} of the time ({shares})"
    if plan.reference_flops and not datasets:
        cached = f"{plan.seconds_with_cache:.2f} s a step once loss.cache_reference holds"
        lines["cache"] = f"{cached} the reference likelihoods of its rows"
    if plan.retained_tokens:
        lines["retained"] = (
            f"the memory left over keeps the graphs of {plan.retained_tokens:,} tokens "
            f"({plan.retained_memory / GIB:.1f} GiB), which are embedded only once"
        )
    if not plan.fits:
        lines["try"] = "; ".join(_remedies(plan))
    if plan.utilisation > 0.76 and plan.device.kind == "cuda":
        lines["note"] = "more than 75% of the peak is not realistic; lower --utilisation"
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def _dataset_line(plan: Plan) -> str:
    """The steps of a dataset and their terms and seconds."""
    terms = ", ".join(term.name for term in plan.job.objective.terms)
    cached = f" ({plan.seconds_with_cache:.2f} s from loss.cache_reference)" if plan.reference_flops else ""
    return f"{plan.steps} steps of {terms}, {plan.seconds:.2f} s each{cached}"


def _remedies(plan: Plan) -> list[str]:
    """Changes that reduce memory, the cheapest first."""
    job, options = plan.job, plan.job.options
    tried = {
        "loss.chunk_tokens=auto": not job.full_batch and (job.chunk_size or job.chunk_tokens is not None),
        "loss=GradCache or GRL, which run in chunks": job.full_batch,
        "model.backbone.gradient_checkpointing=auto": not options.gradient_checkpointing,
        "trainer.strategy of configs/strategy/fsdp.yaml": plan.num_devices > 1 and not plan.fsdp,
        "loss.reference=adapters_off": job.frozen_copy and options.lora_name is not None,
        "model.backbone.dtype=bfloat16": options.dtype in ("float32", "float64"),
        "model.backbone.quantization=nf4": options.quantization == "none" and options.lora_name is not None,
        "lower data.passage_max_length or data.num_hard_negatives": True,
        "more or larger devices": True,
    }
    return [remedy for remedy, helps in tried.items() if helps]


def paper_table(utilisation: float | None = None) -> str:
    """The paper's runs as a Markdown table: GRL, batch 512, 8 negatives, 279,040 rows, LoRA r 16, bfloat16, DDP."""
    from ullme.engine.objective import Objective
    from ullme.engine.presets import grl_terms
    from ullme.models.config import BackboneConfig
    from ullme.planning.plan import Job, make_plan

    lines = [
        "| LLM | paper, 4×A100 | 4×A100-80GB, DDP | memory | 1×H200 | memory |",
        "|---|---|---|---|---|---|",
    ]
    reached: list[float] = []
    used: list[float] = []
    for name, days in PAPER_DAYS.items():
        cells = []
        for device, count in (("a100-80gb", 4), ("h200", 1)):
            options = BackboneConfig(name, dtype="bfloat16", gradient_checkpointing="auto")
            job = Job(options, _llm_config(options, name), Objective(grl_terms()))
            plan = make_plan(job, DEVICES[device], count, utilisation=utilisation)
            cells += [_hours(plan), _memory(plan)]
            reached.append(plan.mfu)
            used.append(plan.utilisation)
        lines.append(f"| {name.split('/')[-1]} | {days} days | {' | '.join(cells)} |")
    note = (
        f"At {min(used):.0%} to {max(used):.0%} of the devices' peak, which is {min(reached):.0%} to "
        f"{max(reached):.0%} model FLOPs utilisation, and without the time of communication."
    )
    return "\n".join([*lines, "", note])


def _hours(plan: Plan) -> str:
    return f"{plan.hours:.1f} h"


def _memory(plan: Plan) -> str:
    from ullme.planning.memory import GIB

    again = ", checkpointing" if plan.job.options.gradient_checkpointing else ""
    size = f"{plan.memory.total / GIB:.0f} of {plan.device.memory_gib:.0f} GiB"
    return f"{size}, chunks of {plan.job.chunk_tokens:,} tokens{again}" if plan.fits else f"{size}: does not fit"
