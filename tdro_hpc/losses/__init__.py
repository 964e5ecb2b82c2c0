"""Embeddings to per-row losses, never through the full score matrix."""

from tdro_hpc.losses.infonce import grouped_infonce, weighted_infonce

__all__ = ["grouped_infonce", "weighted_infonce"]
