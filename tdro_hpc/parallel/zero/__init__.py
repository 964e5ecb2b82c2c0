"""A model whose optimiser, gradients and weights the data ranks share out (ZeRO)."""
