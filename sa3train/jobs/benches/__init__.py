"""What `sa3-bench` measures: one module a bench, each with `run(options) -> list[Figure]`."""
