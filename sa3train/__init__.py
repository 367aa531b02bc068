"""LoRA fine-tuning for Stable Audio 3: import from its packages, which docs/api.md lists.

Importing this package loads nothing heavy.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
