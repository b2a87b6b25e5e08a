"""Import torchvision where its compiled operators are missing.

The index's torchvision is built for CUDA. Beside a CPU build of torch its operators do not load, and then its own
import fails on the schemas it wants to annotate. Declaring those makes datasets and transforms work. Where the
operators are there, this is a plain import.
"""

import importlib
import sys
from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    torchvision = importlib.import_module("torchvision")
    torchvision._declared_operators = library  # type: ignore[attr-defined]  # the schemas live as long as this object
    return torchvision
