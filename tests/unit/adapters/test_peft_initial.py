"""PEFT's LoRA folders, made by PEFT itself, whatever they started from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from helpers.small_model import Small, train_adapter
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.spec import AdapterSpec
from sa3train.adapters.tools import convert_adapter
from sa3train.core.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def train(model: Any, steps: int) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (model() - 1).square().mean().backward()
        optimizer.step()


def play(path: Path) -> Tensor:
    """What the model gives with an adapter."""
    small = Small()
    stack = AdapterStack(small)
    stack.add(load_adapter(path))
    stack.apply()
    return small()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("init", "settings"),
    [
        ("pissa", {}),
        ("olora", {}),
        ("pissa", {"use_rslora": True}),
        ("olora", {"rank_pattern": {"down": 3}, "alpha_pattern": {"down": 5}}),
        ("eva", {}),
        ("orthogonal", {}),
        ("gaussian", {}),
        ("mica", {}),
        (False, {}),
    ],
)
def test_peft_folders_play_as_peft_plays_them_whatever_they_started_from(
    init: str | bool, settings: dict[str, Any], dora: bool, tmp_path: Path
) -> None:
    if dora and init == "mica":
        return
    torch.manual_seed(3)
    targets = ["up", "down"]
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, use_dora=dora, target_modules=targets, **settings)
    trained = get_peft_model(Small(), config)
    train(trained, 20)
    trained.save_pretrained(tmp_path / "peft")
    wanted = PeftModel.from_pretrained(Small(), str(tmp_path / "peft")).merge_and_unload()()
    native = tmp_path / "native.safetensors"
    if init in ("pissa", "olora"):
        with pytest.raises(AdapterError, match="sa3-adapter convert"):
            load_adapter(tmp_path / "peft")
        done = convert_adapter(tmp_path / "peft", native, model=Small(), dtype="fp32")
        assert done.adapter.spec.adapter_type == ("dora-rows" if dora else "lora")
    else:
        convert_adapter(tmp_path / "peft", native, dtype="fp32")
    torch.testing.assert_close(play(native), wanted, atol=3e-5, rtol=0)
    assert (wanted - Small()()).abs().max() > 1e-2


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "PiSSA_niter_2"])
def test_a_start_that_cannot_be_had_again_is_refused(init: str, tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft", train_adapter(AdapterSpec("lora", rank=2), Small()))
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": init}))
    for act in (
        lambda: load_adapter(tmp_path / "peft"),
        lambda: convert_adapter(tmp_path / "peft", "x", model=Small()),
    ):
        with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
            act()


def test_peft_s_own_conversion_is_played(tmp_path: Path) -> None:
    torch.manual_seed(3)
    trained = get_peft_model(Small(), LoraConfig(r=2, init_lora_weights="pissa", target_modules=["up", "down"]))
    trained.peft_config["default"].init_lora_weights = True
    trained.save_pretrained(tmp_path / "initial")
    trained.peft_config["default"].init_lora_weights = "pissa"
    train(trained, 5)
    wanted = trained().detach()
    trained.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    torch.testing.assert_close(play(tmp_path / "peft"), wanted, atol=1e-5, rtol=0)


def test_peft_s_lora_bias_is_played(tmp_path: Path) -> None:
    torch.manual_seed(3)
    trained = get_peft_model(Small(), LoraConfig(r=2, lora_alpha=3, lora_bias=True, target_modules=["up", "down"]))
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(tmp_path / "peft")
    wanted = trained().detach()
    torch.testing.assert_close(play(tmp_path / "peft"), wanted, atol=1e-5, rtol=0)
