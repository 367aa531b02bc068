"""Tools for adapter files: inspect, compare, convert, merge, extract, resize, scale.

`sa3-adapter` and the studio's adapters page call these functions, which return result objects, and only print or show
what they return.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
