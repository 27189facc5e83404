"""The command line of ``ullme plan``: configurations as train.py reads them, and the paper's three backbones."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullme.planning.devices import DEVICES, number_of, this_cpu
from ullme.utils.errors import complain

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ullme.models.config import BackboneConfig
    from ullme.planning.plan import Job, Plan
    from ullme.prompts import Prompts

# Published shapes, for planning where the hub cannot be reached: name -> (model type, what config.json says).
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
    """Print the plan; 0 if it fits, 1 if not, 2 for a mistake."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # the rest of the command line is not for it
    arguments, overrides = _parser().parse_known_args(argv)
    try:
        if arguments.paper:
            print(paper_table(arguments.utilisation))
            return 0
        plan = plan_from(arguments, overrides)
    except (ValueError, argparse.ArgumentError) as error:
        return complain(error)
    from ullme.planning.description import describe

    print(describe(plan))
    return 0 if plan.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ullme plan",
        description="Memory and hours of a run, before it, without weights or a device. Exit status: 0 if it fits, 1 "
        "if not.",
        epilog="Further options override the configuration's, as they do for train.py: --data.batch_size=256.",
    )
    add = parser.add_argument
    add("--config", action="append", default=[], help="a file of train.py's; several are stacked")
    add(
        "--device",
        choices=["cpu", *sorted(DEVICES)],
        default="a100-80gb",
        help="to plan for (default: a100-80gb); cpu: this machine's, whose speed is measured",
    )
    add("--num_devices", "--num-devices", type=int, help="how many of them (default: what the trainer says, or 1)")
    add("--strategy", choices=("ddp", "fsdp"), help="default: what trainer.strategy says")
    add(
        "--utilisation",
        type=float,
        help="share of the device's peak to assume, by all that it runs, what is computed twice too (default: 0.6, and "
        "0.75 on a CPU)",
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
        help="of an average query, template left out (default: MS MARCO's)",
    )
    add(
        "--passage_tokens",
        "--passage-tokens",
        type=float,
        default=75,
        help="of an average passage (default: MS MARCO's)",
    )
    add("--paper", action="store_true", help="a table of the paper's three backbones; needs no configuration")
    return parser


def plan_from(arguments: argparse.Namespace, overrides: Sequence[str]) -> Plan:
    """The plan that a command line asks for. Raises: ValueError: a mistake in it."""
    from ullme.planning.plan import compute_dtype, make_plan

    if not arguments.config:
        raise ValueError("--config: give at least one configuration of train.py's, or --paper")
    config = read_configs([*(f"--config={path}" for path in arguments.config), *overrides])
    strategy = config.trainer.strategy
    named = strategy if isinstance(strategy, str) else strategy.class_path
    fsdp = arguments.strategy == "fsdp" or (
        arguments.strategy is None and any(word in named.lower() for word in ("fsdp", "modelparallel"))
    )
    job = job_from(config, arguments)
    count = _devices_of(config.trainer) if arguments.num_devices is None else arguments.num_devices
    device = this_cpu(compute_dtype(job)) if arguments.device == "cpu" else DEVICES[arguments.device]
    return make_plan(job, device, count, fsdp, arguments.utilisation)


def _devices_of(trainer: Any) -> int:
    """All processes of a run; where the trainer takes what it finds, one for each node."""
    devices = number_of(trainer.devices)
    return trainer.num_nodes * (devices if isinstance(devices, int) else 1)


def read_configs(arguments: Sequence[str]) -> Any:
    """The configuration that train.py would run with, checked, nothing of it instantiated."""
    from ullme.commands.train import ULLMECLI, build

    class Reader(ULLMECLI):
        def before_instantiate_classes(self) -> None:
            pass

        def instantiate_classes(self) -> None:
            pass

    return build([*arguments, "--seed_everything=false"], run=False, kind=Reader).config


def job_from(config: Any, arguments: argparse.Namespace) -> Job:
    """What a configuration is about to train. Raises: ValueError: the LLM or the number of rows is not known."""
    from jsonargparse import ArgumentParser, Namespace

    from ullme.callbacks import FullBatch, LossCallback
    from ullme.models.config import BackboneConfig
    from ullme.planning.plan import Job
    from ullme.prompts import Prompts

    options = BackboneConfig(**config.model.backbone.as_dict())
    prompts = Prompts(**config.model.prompts.as_dict())
    chosen = config.loss.clone()
    frozen_copy = chosen.init_args.pop("reference", None) == "frozen_copy"
    chosen.init_args.pop("cache_reference", None)  # it would be opened
    parser = ArgumentParser()
    parser.add_subclass_arguments(LossCallback, "loss")
    loss = parser.instantiate_classes(parser.parse_object(Namespace(loss=chosen))).loss
    tokens = getattr(loss, "chunk_tokens", None)
    data = config.data
    trains = [data.train] if data.datasets is None else [one.train for one in data.datasets]
    rows = arguments.rows or data.max_rows or sum(map(_count_lines, trains))
    return replace(
        Job(options, _llm_config(options, arguments.backbone_config), loss.objective),
        batch_size=data.batch_size,
        candidates=1 + data.num_hard_negatives,
        rows=rows,
        query_tokens=arguments.query_tokens + _template_tokens(prompts, "query"),
        prompt_tokens=arguments.query_tokens + _template_tokens(prompts, "generation"),
        passage_tokens=arguments.passage_tokens + _template_tokens(prompts, "passage"),
        query_max_length=data.query_max_length,
        passage_max_length=data.passage_max_length,
        chunk_size=getattr(loss, "chunk_size", None),
        chunk_tokens=tokens if isinstance(tokens, int) else None,
        full_batch=isinstance(loss, FullBatch),
        frozen_copy=frozen_copy,
        half=str(config.trainer.precision).startswith("bf16") or options.dtype == "bfloat16",
    )


def _template_tokens(prompts: Prompts, role: Any) -> int:
    """About four and a half characters of English make a token."""
    return math.ceil(len("".join(prompts.around(role))) / 4.5)


def _count_lines(train: str | list[str]) -> int:
    from ullme.data.sources import expand_files

    names = [train] if isinstance(train, str) else train
    try:
        files = [path for name in names for path in expand_files(name, "train")]
    except ValueError as error:
        raise ValueError(
            f"--rows: how many rows has data.train={train!r}? It is no local file; say --rows=N"
        ) from error
    return sum(line.strip() != b"" for path in files for line in path.open("rb"))


def _llm_config(options: BackboneConfig, given: str | None) -> PretrainedConfig:
    """From ``--backbone_config``, the model's own folder, the hub, or the published shapes, in this order."""
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
                raise ValueError(f"{error}; or say --backbone_config") from error
    kind, sizes = SHAPES[name]
    return AutoConfig.for_model(kind, **sizes)


def paper_table(utilisation: float | None = None) -> str:
    """The paper's runs as a Markdown table: GRL, batch 512, 8 negatives, 279,040 rows, LoRA r 16, bfloat16, DDP."""
    from ullme.callbacks.grl import grl_terms
    from ullme.engine.objective import Objective
    from ullme.models.config import BackboneConfig
    from ullme.planning.plan import Job, make_plan

    lines = [
        "| backbone | paper, 4×A100 | 4×A100-80GB, DDP | memory | 1×H200 | memory |",
        "|---|---|---|---|---|---|",
    ]
    reached: list[float] = []
    for name, days in PAPER_DAYS.items():
        cells = []
        for device, count in (("a100-80gb", 4), ("h200", 1)):
            options = BackboneConfig(name, dtype="bfloat16", gradient_checkpointing="auto")
            job = Job(options, _llm_config(options, name), Objective(grl_terms()))
            plan = make_plan(job, DEVICES[device], count, utilisation=utilisation)
            cells += [_hours(plan), _memory(plan)]
            reached.append(plan.mfu)
            assumed = plan.utilisation
        lines.append(f"| {name.split('/')[-1]} | {days} days | {' | '.join(cells)} |")
    note = (
        f"If {assumed:.0%} of the devices' peak are used, which is {min(reached):.0%} to {max(reached):.0%} model "
        "FLOPs utilisation, and what they tell each other costs nothing."
    )
    return "\n".join([*lines, "", note])


def _hours(plan: Plan) -> str:
    return f"{plan.hours:.1f} h"


def _memory(plan: Plan) -> str:
    from ullme.planning.memory import GIB

    again = ", checkpointing" if plan.job.options.gradient_checkpointing else ""
    size = f"{plan.memory.total / GIB:.0f} of {plan.device.memory_gib:.0f} GiB"
    return f"{size}, chunks of {plan.job.chunk_tokens:,} tokens{again}" if plan.fits else f"{size}: does not fit"
