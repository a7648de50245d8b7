"""torchvision's wheel from PyPI holds CUDA kernels only; this makes it importable beside a CPU build of torch.

Its extension cannot load without libtorch_cuda, and its Python half then registers a meta kernel for ``nms``, an
operator that nobody declared. Declaring the schemas first is enough: transforms, and the image processors built on
them, never call the operators.
"""

from __future__ import annotations

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # an operator lives as long as the library that declared it


def install() -> None:
    """Declare torchvision's operators, once a process; call before importing transformers' models or processors."""
    if torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
