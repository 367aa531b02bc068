"""Audio in and out: reading and writing files, resampling, channels and lengths, measurements.

Arrays are float32 tensors (C, N): channels, samples; full scale is ±1.
"""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.audio.edit import fit, mix_channels
    from sa3train.audio.io import AudioInfo, load_audio, read_audio, read_audio_info, write_audio
    from sa3train.audio.metrics import measure

__all__ = ["AudioInfo", "fit", "load_audio", "measure", "mix_channels", "read_audio", "read_audio_info", "write_audio"]
__getattr__ = make_getattr(
    __name__,
    {
        "AudioInfo": "io",
        "fit": "edit",
        "load_audio": "io",
        "measure": "metrics",
        "mix_channels": "edit",
        "read_audio": "io",
        "read_audio_info": "io",
        "write_audio": "io",
    },
)
