"""Recipes, phases, the training loop and its command line. For scripts:

    from trainer import load_recipe, load_results, run_phase

`import trainer` alone loads nothing heavy; the names below are found when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.api import load_results, run_phase
    from trainer.config.load import load_recipe
    from trainer.distributed.interrupt import Interrupted

__all__ = ["Interrupted", "load_recipe", "load_results", "run_phase"]
_HOMES = {
    "Interrupted": "trainer.distributed.interrupt",
    "load_recipe": "trainer.config.load",
    "load_results": "trainer.api",
    "run_phase": "trainer.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
