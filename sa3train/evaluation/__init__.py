"""Evaluate adapters: held-out loss, distance to held-out clips, agreement with prompts, memorization, level, stereo."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
