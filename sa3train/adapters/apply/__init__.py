"""Apply adapters to a loaded model: check that they fit, compute effective weights, stack several of them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
