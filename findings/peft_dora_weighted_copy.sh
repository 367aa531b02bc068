#!/usr/bin/env bash
# PEFT's add_weighted_adapter makes a changed copy of a single DoRA adapter at weight 1.0.
#
# add_weighted_adapter(["style"], [1.0], "copy") is how people duplicate or blend adapters; for LoRA the copy is exact. For
# DoRA it raises nothing and warns of nothing: A and B are combined as for LoRA, but the magnitudes of the new adapter are
# those of its initialization (the norms of the base weight), not the trained ones, so the copy is another adapter.
#
# Seen with: peft 0.21.2, torch 2.14.1 (CPU), Python 3.11 (2026-11-29).
# What it means here: our merging of adapters does not use add_weighted_adapter.
# Exits 1 when the behavior has changed. Downloads torch.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check peft==0.21.2 torch==2.14.1
"$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model


def copy_error(use_dora: bool) -> float:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(32, 24))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["0"], use_dora=use_dora), "style")
    x = torch.randn(8, 32)
    with torch.no_grad():
        plain = base[0].base_layer(x) if hasattr(base[0], "base_layer") else base(x)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
            if "magnitude" in name:
                parameter.mul_(1.5)
        trained = model(x)
        model.add_weighted_adapter(["style"], [1.0], "copy")
        model.set_adapter("copy")
        copied = model(x)
    return float((copied - trained).norm() / (trained - plain).norm())


lora, dora = copy_error(False), copy_error(True)
print(f"error of the copy, relative to the adapter's effect: LoRA {lora:.1e}, DoRA {dora:.2f}")
if lora > 1e-5 or dora < 0.05:
    sys.exit("CHANGED")
print("as described")
PYTHON
