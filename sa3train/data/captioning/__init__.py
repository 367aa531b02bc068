"""Compose captions for clips that have none, save captions beside their audio, and undo it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
