"""Measurements that `tools/benchmark.py` runs, and the data they are run on. Results lie in benchmarks/results."""
