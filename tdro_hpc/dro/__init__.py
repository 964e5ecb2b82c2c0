"""Task weights by distributionally robust optimisation."""

from tdro_hpc.dro.weights import TaskWeights

__all__ = ["TaskWeights"]
