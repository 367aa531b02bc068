"""Train adapters with Lightning: module, loss, callbacks, checkpoints, loggers.

`train` runs a whole training; `sa3-train` calls it with what its configuration names.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
