"""Benchmarks behind `sa3-bench`: each compares a figure with a baseline measured in the same run."""
