"""Parts of benchmarks/infonce.py: cases, implementations, measurement in a process of its own, tables."""
