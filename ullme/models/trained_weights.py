"""Trained weights and their contract, read from Lightning checkpoints and PEFT adapter folders.

Only trained weights are stored, never the frozen LLM. The contract is stored with them: the backbone options and
prompts from which the model is rebuilt, and the fingerprint of the LLM.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ullme.models.config import BackboneConfig
from ullme.models.peft_folder import EXPERT_KEYS, read_adapter_folder
from ullme.prompts import Prompts
from ullme.utils import atomic_files

if TYPE_CHECKING:
    from ullme.models.interface import Embedder

logger = logging.getLogger(__name__)

CONTRACT_KEY = "ullme"
# The prefix of weight names in a Lightning checkpoint: the LightningModule's attribute that holds the model.
STATE_PREFIX = "model."


def contract(model: Embedder) -> dict[str, Any]:
    """The contract of a model: what :func:`rebuild_model` needs besides the trained weights, as plain values."""
    config = model.causal_lm.config.get_text_config()
    shape = {
        key: getattr(config, key, None) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    }
    return {
        "version": 1,
        "backbone": _rebuilding_options(model.options),
        "prompts": model.prompts.to_dict(),
        "matryoshka_dims": list(model.matryoshka_dims),
        "shape": shape,
        "fingerprint": model.fingerprint,
        "llm": {"weights": model.identity.weights, "config": model.identity.config},
    }


def _rebuilding_options(options: BackboneConfig) -> dict[str, Any]:
    """The backbone options to store.

    A run that merged an earlier one (``init_from``) still needs it. One that continued it does not: its checkpoint has
    all trained weights.
    """
    values = options.to_dict()
    if options.init_from is not None:
        merged = options.init_mode == "merge"
        values["init_from"] = str(Path(options.init_from).resolve()) if merged else None
        values["init_mode"] = "merge"
    return values


def trainable_shapes(model: Embedder) -> dict[str, torch.Size]:
    """Name -> unsharded shape of every trained weight, also for a sharded model."""
    unsharded: dict[str, torch.Size] | None = getattr(model, "_whole_shapes", None)
    return unsharded or {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def trainable_state(model: Embedder) -> dict[str, Tensor]:
    """Name -> value of every trained weight, detached."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path stands for: in a run folder the best, else that of the largest step.

    A checkpoint file or a PEFT folder stands for itself.

    Raises:
        ValueError: there is no checkpoint, or the folder has several runs.
    """
    path = Path(path)
    if path.is_file() or (path / "adapter_config.json").is_file():
        return path
    checkpoints = _of_one_run(path, atomic_files.newest_first(path)) if path.is_dir() else []
    if not checkpoints:
        raise ValueError(
            f"checkpoint={str(path)!r}: no such file, or a folder without *.ckpt and without adapter_config.json; "
            "give a run folder, a .ckpt file or a PEFT adapter folder"
        )
    chosen = _best_checkpoint(checkpoints[0], checkpoints) or checkpoints[0]
    logger.info("checkpoint %s: using %s", path, chosen)
    return chosen


def _of_one_run(folder: Path, checkpoints: list[Path]) -> list[Path]:
    """The checkpoints of the folder's own run, or else of the one run below it.

    Raises:
        ValueError: there are several runs below it.
    """
    runs: dict[Path, list[Path]] = {}
    for path in checkpoints:
        runs.setdefault(path.parent.parent if path.parent.name == "checkpoints" else path.parent, []).append(path)
    if folder in runs or len(runs) < 2:
        return runs.get(folder, checkpoints)
    names = [str(run) for run in sorted(runs)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise ValueError(f"checkpoint={str(folder)!r} holds several runs: {', '.join(names[:3])}{more}; give one of them")


def _best_checkpoint(last: Path, checkpoints: list[Path]) -> Path | None:
    """The best checkpoint by the validation metric, as recorded in the last one; None if there is none."""
    candidates = [p for p in checkpoints if p.stem.startswith("best")]
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    callbacks = atomic_files.read(last).get("callbacks", {}).values()
    best = {Path(state["best_model_path"]).name for state in callbacks if state.get("best_model_path")}
    return next((p for p in candidates if p.name in best), candidates[0])


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the contract and the trained weights of a checkpoint, without running code from the file.

    Raises:
        ValueError: unreadable, or not written by this project.
    """
    path = find_checkpoint(path)
    if path.is_dir():
        return read_adapter_folder(path)
    stored = atomic_files.read(path)
    check_contract(stored, path)
    state = {name.removeprefix(STATE_PREFIX): value for name, value in stored["state_dict"].items()}
    return stored[CONTRACT_KEY], state


def check_contract(stored: Any, source: str | Path) -> None:
    """Raises: ValueError: the content of the file is not a checkpoint of this package."""
    if not isinstance(stored, dict) or CONTRACT_KEY not in stored:
        raise ValueError(f"checkpoint={str(source)!r} was not written by ullme: it has no key {CONTRACT_KEY!r}")


def rebuild_model(model_class: type[Any], checkpoint: str | Path, strict: bool = False, **overrides: Any) -> Any:
    """Build a trained model from its contract and load its weights; it is in eval mode.

    Args:
        model_class: :class:`~ullme.models.ULLME`, or a class with the same constructor.
        checkpoint: a run folder, a ``.ckpt`` file or a PEFT adapter folder.
        strict: raise, instead of warning, if the LLM has other weights than in training.
        **overrides: backbone options that replace the stored ones, such as ``model_name_or_path`` or ``dtype``.

    Raises:
        ValueError: unreadable checkpoint, or weights that do not fit.
    """
    stored, state = read_checkpoint(checkpoint)
    known = {field.name for field in fields(BackboneConfig)}
    if unknown := sorted(set(stored["backbone"]) - known):
        raise ValueError(f"checkpoint={str(checkpoint)!r} was written by another version: it has the options {unknown}")
    # Whether foreign code may run is decided by the caller, never by the file.
    options = {**stored["backbone"], "trust_remote_code": False, "family_code": None, **overrides}
    if "." in stored["backbone"].get("pooling", "mean") and "pooling" not in overrides:
        raise ValueError(
            f"checkpoint={str(checkpoint)!r} uses a pooling function of the user, and loading a checkpoint does not "
            f"run code that it names; to allow it, pass pooling={stored['backbone']['pooling']!r}"
        )
    _warn_undeclared(stored, overrides, checkpoint)
    try:
        model = model_class(**options, prompts=Prompts.from_dict(stored["prompts"]))
    except ValueError as error:
        name = str(options["model_name_or_path"])
        absent = f"model_name_or_path={name!r}: cannot load the config.json" in str(error) and not Path(name).exists()
        if "model_name_or_path" in overrides or not absent:
            raise
        raise ValueError(
            f"checkpoint={str(checkpoint)!r} was trained on {name!r}, which is no folder here, seen from {Path.cwd()}, "
            f"and cannot be had from the hub ({error}); say where the LLM is with model_name_or_path (--model)"
        ) from error
    if "undeclared" in stored:
        _compare_tokenizer(model, find_checkpoint(checkpoint))
    copy_weights(model, stored, state, checkpoint, strict)
    model.matryoshka_dims = stored_dims(stored)
    return model.eval()


def stored_dims(stored: dict[str, Any]) -> tuple[int, ...]:
    """The nested numbers of dimensions in a contract; an older contract has none."""
    return tuple(stored.get("matryoshka_dims", ()))


def _warn_undeclared(stored: dict[str, Any], overrides: dict[str, Any], source: str | Path) -> None:
    """Warn about the options that an adapter from elsewhere says nothing about, and that the caller does not set."""
    undeclared = {name: value for name, value in stored.get("undeclared", {}).items() if name not in overrides}
    if undeclared:
        logger.warning(
            "checkpoint %s was not written by ullme and does not say how it embeds; it is used with %s. If it was "
            "trained otherwise its embeddings are wrong: pass %s as it was trained",
            source,
            ", ".join(f"{name}: {value}" for name, value in undeclared.items()),
            ", ".join(undeclared),
        )


def _compare_tokenizer(model: Any, folder: Path) -> None:
    """For an adapter from elsewhere: end texts as the tokenizer beside it does; warn if it differs in other ways."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # damaged or foreign files make the loader raise errors of many types
        raise ValueError(
            f"checkpoint={str(folder)!r}: the tokenizer beside the adapter cannot be loaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200] if str(error) else ''}); remove its files to use the LLM's"
        ) from error
    texts = ["a", "The mill, 1984: größer!"]
    own = model.tokenizer(texts)["input_ids"]
    beside = theirs(texts)["input_ids"]
    if beside == own:
        return
    end = model.tokenizer.eos_token_id
    if beside == [[*ids, end] for ids in own]:
        model.prompts = replace(model.prompts, append_eos=True)
        return
    logger.warning(
        "checkpoint %s has a tokenizer that reads texts otherwise than the LLM's (%s and %s), which is used; to use "
        "it, save the LLM and that tokenizer in one folder and give it as model_name_or_path",
        folder,
        beside[0],
        own[0],
    )


def copy_weights(
    model: Embedder, stored: dict[str, Any], state: dict[str, Tensor], source: str | Path, strict: bool = False
) -> None:
    """Copy trained weights into a model by name; names and shapes must be those of the model's trained weights.

    Args:
        model: the model to copy into.
        stored: the contract stored with the weights.
        state: name -> weight.
        source: the checkpoint's path, for messages.
        strict: as in :func:`rebuild_model`.

    Raises:
        ValueError: names, shapes or the contract do not fit the model.
    """
    renamed = _rename_adapter(state, stored["backbone"].get("lora_name"), model.options.lora_name)
    renamed = _add_head_prefix(renamed, trainable_shapes(model))
    renamed = _drop_frozen(renamed, model, source)
    _check_experts(model, stored, source)
    _check_weights_fit(model, stored, renamed, source)
    if mismatch := _backbone_mismatch(model, stored):
        if strict:
            raise ValueError(mismatch)
        logger.warning("checkpoint %s: %s", source, mismatch)
    with torch.no_grad():
        for name, parameter in trainable_state(model).items():
            parameter.copy_(renamed[name])


def check_saved(model: Embedder, folder: str | Path) -> None:
    """Check that a folder, read as :func:`read_checkpoint` does, holds the model's trained weights.

    Raises:
        ValueError: it cannot be read, or holds other weights.
    """
    stored, state = read_checkpoint(folder)
    _check_experts(model, stored, folder)
    _check_weights_fit(model, stored, state, folder)
    for name, parameter in trainable_state(model).items():
        if not torch.equal(state[name], parameter.cpu()):
            raise ValueError(f"{str(folder)!r} was written with another {name} than the model's; write it again")


def check_can_resume(model: Embedder, checkpoint: dict[str, Any], source: str = "ckpt_path") -> None:
    """Check that a run can resume from a checkpoint: the same LLM, adapter, pooling, attention and prompts.

    Args:
        model: the model of the run.
        checkpoint: the content of a Lightning checkpoint.
        source: its path, for the message.

    Raises:
        ValueError: something differs.
    """
    check_contract(checkpoint, source)
    stored = checkpoint[CONTRACT_KEY]
    state = {name.removeprefix(STATE_PREFIX): value for name, value in checkpoint["state_dict"].items()}
    if Prompts.from_dict(stored["prompts"]) != model.prompts:  # fields that an older contract lacks have their default
        raise ValueError(
            f"checkpoint={source!r} was trained with model.prompts={stored['prompts']}, this run has "
            f"{model.prompts.to_dict()}; resume with the prompts of the training"
        )
    for key in ("pooling", "attention"):
        if stored["backbone"][key] != getattr(model.options, key):
            raise ValueError(
                f"checkpoint={source!r} was trained with {key}={stored['backbone'][key]!r}, this run has "
                f"{getattr(model.options, key)!r}; resume with the {key} of the training"
            )
    _check_weights_fit(model, stored, state, source)
    if mismatch := _backbone_mismatch(model, stored):
        raise ValueError(f"checkpoint={source!r}: {mismatch}")


def _backbone_mismatch(model: Embedder, stored: dict[str, Any]) -> str | None:
    """A message if the weights were trained on another LLM, else None; LLMs are compared only in the same dtype.

    A field of the configuration that only one of them has is no difference: another version of transformers has others.
    """
    trained, options = stored["backbone"], model.options
    comparable = (trained.get("dtype"), trained.get("quantization", "none")) == (options.dtype, options.quantization)
    if not comparable or stored.get("fingerprint", model.fingerprint) == model.fingerprint:
        return None
    known = stored.get("llm")
    if known is not None and known["weights"] == model.identity.weights:
        now, before = (flat_config(config) for config in (model.identity.config, known["config"]))
        changed = next((name for name in sorted(now.keys() & before.keys()) if now[name] != before[name]), None)
        if changed is None:
            return None
        what = f"another configuration ({changed} is {now[changed]!r} and was {before[changed]!r})"
    else:
        what = "other weights" if known else "other weights (or another version of transformers reads its config.json)"
    return (
        f"model_name_or_path={options.model_name_or_path!r} holds {what} than {trained['model_name_or_path']!r}, on "
        "which this checkpoint was trained; name that LLM"
    )


def flat_config(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """An LLM's configuration as dotted name -> value."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flat_config(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _check_weights_fit(model: Embedder, stored: dict[str, Any], state: dict[str, Tensor], source: str | Path) -> None:
    """Raises: ValueError: the LLM's shape, LoRA's options, or names or shapes of weights are not the model's."""
    expected = contract(model)
    adapter = expected["backbone"]["lora_name"] is not None
    for part, key in [("shape", key) for key in expected["shape"]] + [
        ("backbone", "lora_r"),
        ("backbone", "lora_alpha"),
    ] * adapter:
        value = stored.get(part, {}).get(key)
        if value is not None and value != expected[part][key]:
            raise ValueError(
                f"checkpoint={str(source)!r} was trained with {key}={value!r}, but this model has "
                f"{key}={expected[part][key]!r}; load it into the backbone and LoRA options it was trained with"
            )
    shapes = trainable_shapes(model)
    missing, extra = sorted(set(shapes) - set(state)), sorted(set(state) - set(shapes))
    if missing or extra:
        raise ValueError(
            f"checkpoint={str(source)!r} does not fit the model: {len(missing)} weights missing {missing[:2]}, "
            f"{len(extra)} unknown {extra[:2]}; lora_target_modules and lora_name must be those of the training"
        )
    for name, shape in shapes.items():
        if shape != state[name].shape:
            raise ValueError(
                f"checkpoint={str(source)!r}: {name} has shape {tuple(state[name].shape)}, the model's is "
                f"{tuple(shape)}; lora_r must be that of the training"
            )


def _drop_frozen(state: dict[str, Tensor], model: Embedder, source: str | Path) -> dict[str, Tensor]:
    """Leave out copies of the LLM's own weights, such as the embedding that PEFT saves beside an adapter on it.

    Raises:
        ValueError: a copy has other values than the model.
    """
    module: Any = model
    named = module.named_parameters(remove_duplicate=False)  # a head may share the embedding's weight
    frozen = {name: p for name, p in named if not p.requires_grad and name in state}
    for name, parameter in frozen.items():
        copy = state[name].to(parameter)
        if copy.shape != parameter.shape or not torch.equal(copy, parameter):
            raise ValueError(
                f"checkpoint={str(source)!r} brings its own {name.removeprefix('llm.base_model.model.')}, which is not "
                f"that of {model.options.model_name_or_path!r}; merge it into its LLM with PEFT, save the result and "
                "the tokenizer with save_pretrained, and give that folder as model_name_or_path"
            )
    return {name: value for name, value in state.items() if name not in frozen}


def _check_experts(model: Embedder, stored: dict[str, Any], source: str | Path) -> None:
    """Raises: ValueError: the adapter of the experts in a mixture of experts is another than the model's."""
    if "experts" not in stored or model.options.lora_name is None:
        return
    config: Any = model.llm.peft_config[model.options.lora_name]  # type: ignore[index]
    for key in EXPERT_KEYS:
        theirs, ours = (
            sorted(value) if isinstance(value, list | set) else value or None
            for value in (stored["experts"].get(key), getattr(config, key, None))
        )
        if (theirs or None) != (ours or None):
            raise ValueError(
                f"checkpoint={str(source)!r}: the adapter has {key}={theirs!r}, and this model's has {ours!r}; merge "
                "it into its LLM with PEFT, save the result and the tokenizer with save_pretrained, and give that "
                "folder as model_name_or_path"
            )


def _rename_adapter(state: dict[str, Tensor], old: str | None, new: str | None) -> dict[str, Tensor]:
    """Replace the adapter's name, which PEFT puts into the names of its weights, by that of the model's adapter."""
    if old is None or new is None or old == new:
        return state
    return {name.replace(f".{old}.", f".{new}."): value for name, value in state.items()}


def _add_head_prefix(state: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Rename the weights of an adapter that was trained on the LLM without its LM head, as many libraries do.

    ``base_model.model.layers.0`` there is ``base_model.model.model.layers.0`` here.
    """
    names, prefix = set(expected), "llm.base_model.model."
    for module in {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}:
        moved = {name.replace(prefix, f"{prefix}{module}.", 1): value for name, value in state.items()}
        if not names & state.keys() and names & moved.keys():
            return moved
    return state
