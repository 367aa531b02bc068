"""Spectra for losses: values and gradients of torch.stft."""

import pytest
import torch

from sa3train.audio.spectrum import compute_stft


@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
@pytest.mark.parametrize(("size", "hop"), [(64, 16), (16, 16), (32, 5)])
def test_spectra_and_gradients_are_those_of_torch(pad_mode: str, size: int, hop: int) -> None:
    torch.manual_seed(0)
    audio_BN = torch.randn(3, 100, dtype=torch.float64, requires_grad=True)
    window = torch.hann_window(size, dtype=torch.float64)
    expected = torch.stft(audio_BN, size, hop, window=window, pad_mode=pad_mode, return_complex=True)
    made = compute_stft(audio_BN, size, hop, pad_mode)  # type: ignore[arg-type]
    torch.testing.assert_close(made, expected)
    weights = torch.randn(expected.shape, dtype=torch.complex128)
    gradients = [torch.autograd.grad((x * weights).real.sum() + x.abs().sum(), audio_BN)[0] for x in (made, expected)]
    torch.testing.assert_close(*gradients)
