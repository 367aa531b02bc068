"""The mathematics of diffusion as pure functions: schedules, samplers, guidance, masks, training objective.

Formulas and their sources: docs/model.md, sections 5 and 6.
"""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.diffusion.guidance import Guidance
    from sa3train.diffusion.samplers import SAMPLERS
    from sa3train.diffusion.schedule import SHIFTS, build_schedule

__all__ = ["SAMPLERS", "SHIFTS", "Guidance", "build_schedule"]
__getattr__ = make_getattr(
    __name__, {"SAMPLERS": "samplers", "SHIFTS": "schedule", "Guidance": "guidance", "build_schedule": "schedule"}
)
