"""The start of nano's next autoencoder: linear, silent in silence, and of the released layout."""

import pytest
import torch
from start import RATE, build_codec, set_start


@pytest.mark.slow
def test_the_start_keeps_low_tones_and_silence() -> None:
    torch.manual_seed(0)
    t = torch.arange(8 * 4096) / RATE
    tones = torch.stack([torch.sin(2 * torch.pi * f * t + f) for f in torch.linspace(60, 700, 64).tolist()])
    audio_BCN = 0.1 * (tones[:, None] + 0.1 * torch.randn(64, 2, tones.shape[1]))
    model = build_codec()
    set_start(model, audio_BCN)
    with torch.no_grad():
        real = audio_BCN[::8]
        made = model.decode(model.encode(real), generator=torch.Generator().manual_seed(0))
        silent = model.decode(model.encode(torch.zeros(1, 2, 8192)), generator=torch.Generator().manual_seed(0))
    assert float((real - made).square().sum() / real.square().sum()) < 0.3
    assert float(silent.square().mean()) < 1e-6
    assert sum(weight.numel() for weight in model.parameters()) < 6.3e6
