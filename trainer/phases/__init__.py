"""One file per phase; no phase imports another, only the run folder links them. Each has the functions

    run(run)                         makes its result; run(run, module) or run(run, module, expert) where the table of
                                     phases (trainer/request/graph.py) says that it is repeated, run(run, start) of the
                                     two that go by the start of end-to-end training
    objective(run, ...)              what is taught, built once for training, rehearsal and benchmarks
    taught(run, module)              the same before any training, for plans; None where nothing is trained
    rehearse(run, module, known)     everything but the training: what it finds, and what the training will cost

    check(run)                       what can be known before anything trains, where there is something

of which those that train nothing have the first alone.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from trainer.request.graph import row_of


def code_of(phase: str) -> ModuleType:
    """The file of a phase."""
    return importlib.import_module(row_of(phase).code or f"{__name__}.{phase}")
