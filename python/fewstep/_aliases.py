"""Module paths of earlier versions still import, by a table and a finder that reads it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# An earlier path, and the modules that hold its names now.
ALIASES = {
    "fewstep.augment": ("fewstep.methods.augment",),
    "fewstep.checkpoint": ("fewstep.training.checkpoint", "fewstep._files"),
    "fewstep.pairs": ("fewstep.data.pairs", "fewstep.data.generate"),
    "fewstep.plots": ("fewstep.training.plots",),
    "fewstep.score": ("fewstep.conversions",),
    "fewstep.toys": ("fewstep.data.toys",),
    "fewstep.train": ("fewstep.training.wflow", "fewstep.training.runs"),
    "fewstep.train_lines": ("fewstep.training.lines",),
    "fewstep.train_reflow": ("fewstep.training.reflow",),
}


class _Finder(MetaPathFinder, Loader):
    """Makes a module for each alias. A name is looked up in its present module when asked for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in ALIASES else None

    def exec_module(self, module: ModuleType) -> None:
        homes = ALIASES[module.__name__]
        module.__doc__ = f"An earlier path of {' and '.join(homes)}."

        def find(name: str) -> Any:
            if name == "__all__":
                names = {
                    name for home in map(importlib.import_module, homes) for name in vars(home)
                }
                return sorted(name for name in names if not name.startswith("_"))
            if not name.startswith("__"):
                for home in map(importlib.import_module, homes):
                    if hasattr(home, name):
                        return getattr(home, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__dict__["__getattr__"] = find


def install() -> None:
    """Put the finder last, so that a module that exists is never shadowed."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
