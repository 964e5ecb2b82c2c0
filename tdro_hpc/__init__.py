"""tDRO training of LLM-based dense retrievers on Slurm clusters and laptops."""

__version__ = "0.1.0"
