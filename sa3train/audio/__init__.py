"""Audio in and out: reading and writing files, resampling, channels and lengths, measurements.

Arrays are float32 tensors (C, N): channels, samples; full scale is ±1.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
