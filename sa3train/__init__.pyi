from .inference import Generator as Generator

__version__: str
