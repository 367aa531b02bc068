"""Adapters of the LoRA family: read and write files, apply them to a model, train them, and edit them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
