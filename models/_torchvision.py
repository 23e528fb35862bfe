"""The cure for PyPI's torchvision beside a CPU build of torch; does nothing on a healthy install.

PyPI's torchvision wheels are linked against CUDA torch. Beside CPU torch their C++ operators do not load, and
`import torchvision` stops with "operator torchvision::nms does not exist". timm and transformers import torchvision,
but this product uses none of its operators, so declaring the two missing schemas is enough.
"""

import importlib.util

import torch


def declare_missing_operators() -> bool:
    """Declare torchvision's `nms` and `qnms` when its operators cannot load here. Returns whether that was needed.

    The test is the one that matters: torchvision is imported, and only the failure named above is cured.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return False
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)  # the schemas live as long as this object
    return True


_LIBRARIES: list[torch.library.Library] = []
declare_missing_operators()
