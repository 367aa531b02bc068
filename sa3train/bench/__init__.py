"""Benchmarks of `sa3-bench`: each compares its figures with a baseline measured in the same run, and with a target.

Each benchmark is a module with `run(options) -> list[Figure]`; `sa3train.cli.bench` lists them.
"""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.bench.figures import Figure, Options, Record

__all__ = ["Figure", "Options", "Record"]
__getattr__ = make_getattr(__name__, {"Figure": "figures", "Options": "figures", "Record": "figures"})
