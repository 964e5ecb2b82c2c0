"""RMS norms of a backbone by the fused kernel of NVIDIA's apex, where that is installed. Names and weights stay."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Kernel = Callable[..., Tensor]  # (input, weight, normalised shape, eps) -> output in the type of the weight


class FusedRMSNorm(nn.Module):
    """The RMS norm of a transformers model in one kernel (arXiv 1910.07467, equation 4)."""

    def __init__(self, norm: Any, kernel: Kernel) -> None:
        """norm  the module whose place it takes: its `weight` and `variance_epsilon` are used"""
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
        self._kernel = kernel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., width], computed in float32, in the type of the weight."""
        # Autocast would round the weight first; what it replaces is not cast either.
        with torch.autocast(hidden.device.type, enabled=False):
            return self._kernel(hidden, self.weight, tuple(self.weight.shape), self.variance_epsilon)


def fuse_norms(backbone: nn.Module, device: torch.device) -> int:
    """Put apex's kernel in the place of each RMS norm; returns how many. None without a GPU or without apex."""
    kernel = _apex_kernel() if device.type == "cuda" else None
    if kernel is None:
        return 0
    fused = 0
    for module in list(backbone.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                setattr(module, name, FusedRMSNorm(child, kernel))
                fused += 1
    print(f"norms: {fused} by the fused kernel of apex")
    return fused


def _apex_kernel() -> Kernel | None:
    """None where apex is not installed; another package of that name has no such function."""
    try:
        return import_module("apex.normalization.fused_layer_norm").mixed_dtype_fused_rms_norm_affine
    except Exception:  # built for another torch, or for none: any error may come out of its import
        return None
