"""The models: diffusion transformer, SAME autoencoder, conditioners, and loading their checkpoints.

What they compute: docs/model.md. Names and shapes of parameters are those of the released files.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
