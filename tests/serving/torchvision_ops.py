"""Lets torchvision be imported beside a torch that its compiled part was not built for.

`prepare.py` copies this file into the environment, with a ``.pth`` file that runs it at start. torchvision's Python
code asks for two operators when it is imported; they are declared, never implemented: image transforms need neither.
"""

import sys


class _Declare:
    """A finder that finds nothing, but acts when torchvision is looked for."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library = library  # the declarations live as long as this object
            _kept.append(self)
        return None


_kept = []
sys.meta_path.insert(0, _Declare())
