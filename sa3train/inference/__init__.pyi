from .generator import Generator as Generator
from .outputs import GenerationOutput as GenerationOutput
from .settings import GenerationSettings as GenerationSettings
from .sidecar import read_sidecar as read_sidecar
