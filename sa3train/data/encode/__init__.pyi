from .encode import EncodeResult as EncodeResult
from .encode import encode_dataset as encode_dataset
from .encoder import Encoder as Encoder
from .settings import EncodeSettings as EncodeSettings
from .workers import Workers as Workers
