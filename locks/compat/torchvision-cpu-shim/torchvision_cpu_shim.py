"""Makes `import torchvision` work where torch is a CPU build and torchvision one for CUDA.

Such a torchvision cannot load its compiled library and accepts that, but a moment later it
registers shape functions for two operators of that library, `nms` and `qnms`, and torch refuses
because nobody has declared them. This module declares the two at the one moment between those
steps: when Python looks for `torchvision._meta_registrations`. Where the library did load (CUDA,
a CPU build of torchvision, macOS) it does nothing, and until torchvision is imported it costs one
dictionary lookup per import. The .pth file beside it brings it into every process of the
environment: vLLM's engine and Ray's workers import torchvision too.
"""
import sys

_declared = []  # torch drops the declaration when this object dies


class _DeclareOperators:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision._meta_registrations" or _declared:
            return None
        extension = sys.modules.get("torchvision.extension")
        if extension is None or extension._has_ops():
            return None
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        return None  # only a listener: the ordinary finders find the module


if _DeclareOperators not in sys.meta_path:
    sys.meta_path.insert(0, _DeclareOperators)
