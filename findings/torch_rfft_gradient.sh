#!/usr/bin/env bash
# The gradient of torch.fft.rfft, and so of torch.stft, is a complex transform of zero-padded gradients, not a real one.
#
# An expert would think that the backward pass of a real FFT costs what the forward pass does: its adjoint is irfft with
# the inner bins halved, to the last digit. torch pads the gradient with zeros to all N bins, transforms these as complex
# numbers and keeps the real part: twice the values, and a transform of twice the work. For frames that overlap by three
# quarters, as in every spectral loss of a vocoder or an autoencoder, that is most of what the loss costs.
#
# Seen with: Python 3.11, Linux x86-64, torch 2.14.1 (2026-12-01): `aten::_fft_c2c` backwards, in 0.094 s for 2000 frames
# of 2048 samples on one thread of an AMD EPYC (Zen 2); irfft does the same in 0.017 s. The transforms are checked, not
# the times.
# What it means here: sa3train/audio/spectrum.py has a gradient of its own; a decoder step on nano takes 0.7 of the
# processor time. Exits 1 when the behavior has changed. Downloads several GB.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}

"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.14.1 numpy
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys
import time

import torch
from torch.profiler import profile

torch.manual_seed(0)
torch.set_num_threads(1)
frames = torch.randn(2000, 2048, requires_grad=True)
spectra = torch.fft.rfft(frames)
weights = torch.randn_like(spectra)


def adjoint(gradient):
    halved = torch.cat([gradient[:, :1], gradient[:, 1:-1] / 2, gradient[:, -1:]], dim=1)
    return torch.fft.irfft(halved, norm="forward")


def list_transforms(function):
    with profile() as seen:
        function()
    return sorted({event.key for event in seen.key_averages() if event.key.startswith("aten::_fft")})


def measure(function):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def backward():
    return torch.autograd.grad(spectra, frames, weights, retain_graph=True)[0]


difference = (backward() - adjoint(weights)).abs().max() / backward().abs().max()
print("forward:          ", list_transforms(lambda: torch.fft.rfft(frames)))
print("torch's backward: ", list_transforms(backward))
print("a real one:       ", list_transforms(lambda: adjoint(weights)), f"differs by {difference:.1e} of the largest")
print(f"seconds: {measure(backward):.3f} and {measure(lambda: adjoint(weights)):.3f}")
sound = torch.randn(1, 44100, requires_grad=True)
stft = torch.stft(sound, 2048, 512, window=torch.hann_window(2048), return_complex=True).abs().sum()
in_stft = list_transforms(stft.backward)
print("backward of stft: ", in_stft)
if list_transforms(backward) != ["aten::_fft_c2c"] or in_stft != ["aten::_fft_c2c"] or difference > 1e-5:
    print("CHANGED")
    sys.exit(1)
PYTHON
echo "as described"
