"""List source clips and read their captions, from local folders, tars, manifests and remote storage."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
