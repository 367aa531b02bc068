"""LoRA fine-tuning for Stable Audio 3: import from its packages, which docs/api.md lists.

Importing this package loads nothing heavy.
"""

from sa3train.core.lazy import make_getattr

__all__ = ["Generator"]
__version__ = "0.1.0"
__getattr__ = make_getattr(__name__, {"Generator": "inference.generator"})
