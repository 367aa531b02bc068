"""The mathematics of diffusion as pure functions: schedules, samplers, guidance, masks, training objective.

Formulas and their sources: docs/model.md, sections 5 and 6.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
