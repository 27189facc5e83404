"""A plan in words."""

from __future__ import annotations

from ullme.planning.memory import GIB
from ullme.planning.plan import USABLE, Plan


def describe(plan: Plan) -> str:
    """The prediction in words."""
    job, memory = plan.job, plan.memory
    room = plan.device.memory_gib
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in vars(memory).items() if size >= 0.05 * GIB)
    verdict = "fits" if plan.fits else f"does NOT fit ({USABLE:.0%} of {room:.1f} GiB may be planned with)"
    strategy = ("fsdp" if plan.fsdp else "ddp") if plan.num_devices > 1 else "one device"
    chunk = (
        f"{job.chunk_size} queries" if job.chunk_size else f"{job.chunk_tokens:,} tokens" if job.chunk_tokens else "all"
    )
    checkpointing = "on" if job.options.gradient_checkpointing else "off"
    lines = {
        "model": f"{job.options.model_name_or_path}: {plan.weights / 1e9:.2f} B weights, "
        f"{plan.trained / 1e6:.1f} M trained",
        "step": f"{job.batch_size} queries x {job.candidates} passages; {job.query_tokens:.0f} tokens a query, "
        f"{job.passage_tokens:.0f} a passage",
        "devices": f"{plan.num_devices} x {plan.device.name}, {strategy}",
        "chunks": f"{plan.chunks} of {chunk}, gradient checkpointing {checkpointing}",
        "memory": f"{memory.total / GIB:.1f} of {room:.1f} GiB a device: {verdict}",
        "": f"({parts})",
        "time": f"{plan.seconds:.2f} s a step, {plan.hours:.2f} hours an epoch of {plan.steps} steps, "
        f"if {plan.utilisation:.0%} of the peak are used (model FLOPs utilisation {plan.mfu:.0%})",
    }
    if plan.retained_tokens:
        lines["retained"] = (
            f"the memory left over keeps the graphs of {plan.retained_tokens:,} tokens, which are embedded only once"
        )
    if not plan.fits:
        lines["try"] = "; ".join(_remedies(plan))
    if plan.utilisation > 0.75:
        lines["note"] = "beyond 75% of the peak is out of reach: lower --utilisation"
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def _remedies(plan: Plan) -> list[str]:
    """What makes a run smaller, the cheapest first."""
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
