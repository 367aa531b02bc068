from .guidance import Guidance as Guidance
from .samplers import SAMPLERS as SAMPLERS
from .schedule import SHIFTS as SHIFTS
from .schedule import build_schedule as build_schedule
