"""Whether the teacher of a KL ranks better than chance: the configuration's own LLM on its own training rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ullme.commands.doctor.checks import NotChecked

if TYPE_CHECKING:
    from ullme.commands.doctor.settings import Settings

# A larger LLM takes too long on a CPU.
_MOST_WEIGHTS_ON_CPU = 500_000_000


def teacher(settings: Settings) -> str:
    """Measure it, with a warning where it is at chance: the run is sound all the same.

    Raises:
        NotChecked: there is no KL, no label, or the LLM is not here or too large.
    """
    import torch

    from ullme.commands.plan import data_module
    from ullme.engine.reference import AdaptersOff, FrozenCopy
    from ullme.engine.teacher_quality import measure_teacher, taught_term
    from ullme.models.ullme import ULLME
    from ullme.prompts import Prompts
    from ullme.training.rows import datasets_for_teacher

    objective = settings.job.objective
    kl = taught_term(objective)
    if kl is None:
        raise NotChecked("the loss has no KL, so nothing is taught by likelihoods")
    name = settings.options.model_name_or_path
    if not settings.is_local:
        raise NotChecked(f"{name} is not on this machine yet; the run measures its teacher before the first step")
    gpu = torch.cuda.is_available() and settings.config.trainer.accelerator != "cpu"
    if not gpu and settings.plan.weights > _MOST_WEIGHTS_ON_CPU:
        raise NotChecked(f"{name} is too large for a CPU; the run measures its teacher before the first step")
    data = data_module(settings.config.data, val=None)
    data.setup("fit")
    datasets = datasets_for_teacher(data, kl.name)
    if not datasets:
        raise NotChecked("no training rows have labels and hard negatives to measure the teacher by")
    prompts = Prompts(**settings.config.model.prompts.as_dict())
    model = ULLME(**settings.options.to_dict(), prompts=prompts).eval().to("cuda" if gpu else "cpu")
    if objective.uses_reference:  # computed here: a check neither reads nor fills the run's cache
        objective.reference = FrozenCopy() if settings.options.lora_name is None else AdaptersOff()
        objective.reference.prepare(model, str(settings.config.trainer.precision), objective.reference_likelihoods)
    batches = data.first_batches(model.prompt_tokenizer, objective.likelihoods, datasets=datasets)
    quality = measure_teacher(objective, model, batches)
    assert quality is not None  # there are rows with labels, and nothing is missing
    return f"warning: {quality}: {quality.remedy}" if quality.at_chance else str(quality)
