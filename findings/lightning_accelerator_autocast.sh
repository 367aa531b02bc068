#!/usr/bin/env bash
# Lightning's "bf16-mixed" on an accelerator of one's own autocasts for CUDA, so that the device computes in fp32.
#
# Lightning 2.6 has no accelerator for Intel's GPUs; its documentation shows how to write one. With such an accelerator
# given as an object, precision="bf16-mixed" makes a plugin for the device type "cuda": the accelerator's own type is used
# for the names "cpu" and "mps" only. Forward passes are not autocast then; on a machine without CUDA, a warning of torch's
# that CUDA is not available is all that says so. The way out is to give the plugin itself:
# plugins=[MixedPrecision("bf16-mixed", "xpu")].
#
# Seen with: lightning 2.6.6, torch 2.14.1 (CPU), Python 3.11 (2026-11-29).
# What it means here: sa3train gives the plugin itself on every device.
# Exits 1 when the behavior has changed. Downloads torch.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 lightning==2.6.6 numpy
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import lightning.pytorch as lightning
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy


class OtherAccelerator(CPUAccelerator):  # the CPU under another name, so that it runs here
    @staticmethod
    def name():
        return "other"


class Probe(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def training_step(self, batch, index):
        self.found = self.layer(batch).dtype
        return self.layer(batch).float().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


found = {}
for name, accelerator in (("cpu", "cpu"), ("an accelerator of one's own", OtherAccelerator())):
    trainer = lightning.Trainer(
        accelerator=accelerator, devices=1, strategy=SingleDeviceStrategy("cpu"), precision="bf16-mixed", max_steps=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    probe = Probe()
    trainer.fit(probe, torch.utils.data.DataLoader(torch.ones(1, 4)))
    found[name] = (trainer.precision_plugin.device, probe.found)
    print(f"{name}: autocast for {found[name][0]!r}, the layer computes in {probe.found}")
changed = list(found.values()) != [("cpu", torch.bfloat16), ("cuda", torch.float32)]
print("the behavior has changed" if changed else "as described")
sys.exit(changed)
PYTHON
