from .edit import fit as fit
from .edit import mix_channels as mix_channels
from .io import AudioInfo as AudioInfo
from .io import load_audio as load_audio
from .io import read_audio as read_audio
from .io import read_audio_info as read_audio_info
from .io import write_audio as write_audio
from .metrics import measure as measure
