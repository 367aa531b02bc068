"""Benchmarks of `sa3-bench`: each compares its figures with a baseline measured in the same run, and with a target.

Each benchmark is a module with `run(options) -> list[Figure]`; `sa3train.cli.bench` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
