from .autoencoder import Autoencoder as Autoencoder
from .checkpoint import StableAudio3 as StableAudio3
from .checkpoint import load_autoencoder as load_autoencoder
from .checkpoint import load_checkpoint as load_checkpoint
from .hub import REGISTRY as REGISTRY
