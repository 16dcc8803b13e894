"""Declare two operators, so that torchvision can be imported next to PyTorch for CPUs.

PyPI has torchvision for CUDA only, whose library does not load then. Nothing that a text needs
calls the operators. Copied to `sitecustomize.py` of an environment, as vLLM starts more processes.
"""

import torch

if torch.version.cuda is None:
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
