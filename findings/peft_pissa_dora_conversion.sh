#!/usr/bin/env bash
# PEFT's conversion of a PiSSA adapter to an ordinary LoRA drops DoRA's magnitudes.
#
# save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL) is the documented way to publish an adapter that
# started as PiSSA, CorDA or OLoRA, so that it works on the untouched base model. For LoRA it is exact. With use_dora=True it
# raises nothing and warns of nothing, but writes only the factors: adapter_config.json still says use_dora, the trained
# magnitudes are in no file, and loading sets them to the norms of the base weight, after a warning about missing keys.
#
# Seen with: peft 0.21.2, torch 2.14.1 (CPU), Python 3.11 (2026-11-29).
# What it means here: such a folder is refused (its use_dora contradicts its tensors); the folder from before this
# conversion is converted exactly: sa3-adapter convert FOLDER NEW.safetensors --model NAME.
# Exits 1 when the behavior has changed. Downloads torch.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check peft==0.21.2 torch==2.14.1
"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

warnings.simplefilter("ignore")
work = sys.argv[1]


def build_base() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 24))


def conversion_error(use_dora: bool) -> tuple[float, list[str]]:
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa", use_dora=use_dora)
    model = get_peft_model(build_base(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(f"{work}/initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if "magnitude" in name:
                parameter.mul_(1.5)
    x = torch.randn(8, 32)
    plain, trained = build_base()(x), model(x)
    model.save_pretrained(f"{work}/converted", path_initial_model_for_weight_conversion=f"{work}/initial")
    converted = PeftModel.from_pretrained(build_base(), f"{work}/converted")(x)
    error = float((converted - trained).norm() / (trained - plain).norm())
    return error, sorted(load_file(f"{work}/converted/adapter_model.safetensors"))


lora, _ = conversion_error(False)
dora, names = conversion_error(True)
print(f"error of the conversion, relative to the adapter's effect: LoRA {lora:.1e}, DoRA {dora:.2f}")
print("tensors of the converted DoRA:", ", ".join(names))
if lora > 1e-4 or dora < 0.05 or any("magnitude" in name for name in names):
    sys.exit("CHANGED")
print("as described")
PYTHON
