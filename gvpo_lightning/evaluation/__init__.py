"""Benchmarks: problems, the metrics of their completions, and what is written of them."""
