"""Evaluate generated audio: audible attributes (pitch, onsets, decay) and a classifier of instruments."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
