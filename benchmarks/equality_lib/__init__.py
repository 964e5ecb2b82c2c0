"""Parts of benchmarks/parallel_equality.py: what a rank computes, and the comparison of two runs."""
