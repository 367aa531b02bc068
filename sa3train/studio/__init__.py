"""A local web page to play adapters, watch training runs, and prepare data; `sa3-studio` starts it.

`server/` holds what all pages share; `play/`, `runs/`, `data/` and `adapters/` are one page each.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
