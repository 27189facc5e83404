"""Modules of version 0.1 under their old names, so that saved configurations and scripts go on working."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old name -> where its contents are now; the first module that has a name gives it.
MOVED: dict[str, tuple[str, ...]] = {
    "ullme.chunking": ("ullme.planning.auto_chunk",),
    "ullme.cli": ("ullme.commands.train",),
    "ullme.config_files": ("ullme.utils.config_files",),
    "ullme.devices": ("ullme.planning.devices",),
    "ullme.flops": ("ullme.planning.flops",),
    "ullme.gradcache": ("ullme.engine.gradcache",),
    "ullme.health": ("ullme.engine.finite",),
    "ullme.memory": ("ullme.planning.memory",),
    "ullme.miniatures": ("ullme.utils.tiny_models",),
    "ullme.module": ("ullme.training.module",),
    "ullme.named": ("ullme.utils.dotted_names",),
    "ullme.objective": ("ullme.engine.objective",),
    "ullme.plan": ("ullme.planning.plan",),
    "ullme.plan_cli": ("ullme.commands.plan", "ullme.commands.train"),
    "ullme.quickstart": ("ullme.commands.quickstart",),
    "ullme.reference": ("ullme.engine.reference",),
    "ullme.refusals": ("ullme.utils.errors",),
    "ullme.resume": ("ullme.training.resume",),
    "ullme.sharding": ("ullme.engine.fsdp", "ullme.models.trained_weights"),
    "ullme.storage": ("ullme.utils.atomic_files",),
    "ullme.progress": ("ullme.utils.progress",),
    "ullme.support": ("ullme.commands.support.survey",),
    "ullme.callbacks.settle": ("ullme.callbacks.choose_chunking",),
    "ullme.callbacks.leaving": ("ullme.training.signals",),
    "ullme.data.miniature": ("ullme.demo.world",),
    "ullme.data.miniature_lm": ("ullme.demo.language_model",),
    "ullme.eval.cli": ("ullme.commands.evaluate",),
    "ullme.eval.retrieval": ("ullme.training.retrieval_metrics",),
    "ullme.models.backbone": ("ullme.models.config", "ullme.models.loading"),
    "ullme.models.identity": ("ullme.models.wrapped",),
    "ullme.models.adapter_folder": ("ullme.models.trained_weights",),
    "ullme.models.layers": ("ullme.models.attention.layers",),
    "ullme.models.packing": ("ullme.models.attention.packing",),
    "ullme.models.paths": ("ullme.models.attention.paths",),
    "ullme.models.quantization": ("ullme.models.loading",),
    "ullme.models.rows": ("ullme.models.attention.packed_rows",),
}

# Packages that moved with all their modules.
MOVED_PACKAGES = {f"ullme.{name}": f"ullme.commands.{name}" for name in ("doctor", "export", "reproduce")}


def successors(name: str) -> tuple[str, ...]:
    """Where the contents of an old module are now; empty for a name that has not moved."""
    for old, new in MOVED_PACKAGES.items():
        if name == old or name.startswith(f"{old}."):
            return (name.replace(old, new, 1),)
    return MOVED.get(name, ())


class _MovedLoader(Loader):
    """Makes a module whose attributes are those of its successors."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = successors(spec.name)
        warnings.warn(f"{spec.name} has moved to {new[0]}; change the name", FutureWarning, stacklevel=2)
        module = ModuleType(spec.name, f"Moved to {', '.join(new)}.")

        def find(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            for target in map(import_module, new):
                if hasattr(target, name):
                    return getattr(target, name)
            raise AttributeError(f"module {spec.name!r}, now {new[0]!r}, has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


class MovedModules(MetaPathFinder):
    """Finds moved modules under their old names, after every other finder has failed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not successors(fullname):
            return None
        return ModuleSpec(fullname, _MovedLoader(), is_package=fullname in MOVED_PACKAGES)


def install() -> None:
    """Make the old names importable; a second call changes nothing."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
