"""The cure for PyPI's torchvision beside a CPU build of torch; does nothing on a healthy install.

PyPI's torchvision wheels are linked against CUDA torch. Beside CPU torch their C++ operators do not load, and
`import torchvision` stops with "operator torchvision::nms does not exist". timm and transformers import torchvision,
but this product uses none of its operators, so declaring the two missing schemas is enough.

Nothing is imported here: the cure waits for the import of torchvision, so that `m2mkd --help` needs no torch.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class CuredImport(MetaPathFinder):
    """Finds torchvision where Python would, and lets its import be cured."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """The spec of torchvision itself; of everything else None, which leaves it to others."""
        if name != "torchvision":
            return None
        spec: ModuleSpec | None = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(_run, spec.loader.exec_module)
        return spec


def _run(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Import torchvision, and when just the failure named above comes, declare what is missing and import it again."""
    try:
        execute(module)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _declare_missing_operators()
        execute(module)


def _declare_missing_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)  # the schemas live as long as this object


_LIBRARIES: list[Any] = []
if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, CuredImport())
