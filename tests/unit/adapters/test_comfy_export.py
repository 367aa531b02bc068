"""Files for ComfyUI are as small as the adapter and play as it does, by a reading of ComfyUI's rule of our own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.golden import PLAIN
from helpers.small_model import Small, train_adapter
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.layer_weight import get_layer_adapter
from sa3train.adapters.formats.comfy_write import write_comfy
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.adapters.tools import convert_adapter
from sa3train.adapters.tools.base_weights import get_weights
from sa3train.adapters.tools.comfy_export import export_to_comfy
from sa3train.core.errors import AdapterError
from sa3train.models.checkpoint import load_checkpoint

DENSE = ("bora", "bora-xs")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_checkpoint(PLAIN, device="meta", parts=("dit", "conditioner"))


def golden(kind: str) -> Path:
    return PLAIN / "adapters" / f"{kind}.safetensors"


def play_as_comfyui(stored: dict[str, Tensor], path: str, W: Tensor, strength: float) -> Tensor:
    """What ComfyUI makes of a weight: a patch gives a new weight, of whose difference to the old one a share is added.

    A scale with as many first entries as the weight has rows belongs to rows, and is divided by what these measured
    before; any other belongs to columns, and is divided by what they measure afterwards.
    """
    key = f"diffusion_model.{path.removeprefix('model.')}."
    layer = {name.removeprefix(key): x.double() for name, x in stored.items() if name.startswith(key)}
    old = W.double()
    if "diff" in layer:
        return old + strength * layer["diff"]
    down, up = layer["lora_down.weight"], layer["lora_up.weight"]
    new = old + float(layer.get("alpha", len(down))) / len(down) * (up @ down).reshape(old.shape)
    if "dora_scale" in layer:
        tiny = torch.finfo(torch.float32).eps
        if len(layer["dora_scale"]) == len(old):
            lengths = old.flatten(1).norm(dim=1).reshape(-1, *[1] * (old.ndim - 1))
        else:
            lengths = new.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (old.ndim - 2))
        new = new * layer["dora_scale"] / (lengths + tiny)
    return old + strength * (new - old)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_plays_in_comfyui_as_it_does_here(kind: str, dense: bool, model: Any, tmp_path: Path) -> None:
    target, original, weights = tmp_path / "a.safetensors", load_adapter(golden(kind)), get_weights(model)
    done = convert_adapter(golden(kind), target, "comfy", model, dtype="fp32", dense=dense)
    assert done.error.relative < 1e-5
    stored = load_file(target)
    assert any(key.endswith(".diff") for key in stored) == (dense or kind in DENSE)
    assert any(key.endswith(".dora_scale") for key in stored) == ("dora" in kind and not dense)
    with safe_open(target, framework="pt") as file:
        assert file.metadata()["comfyui"] == "0.33.0"
    for path in original.tensors:
        if not path.startswith("model."):
            continue
        W = weights[path]
        whole = get_layer_adapter(original, path, W).weight(W)
        for strength in (0.5, 1.0, 1.3, 0.0, -0.7):
            found = play_as_comfyui(stored, path, W, strength)
            expected = torch.lerp(W.double(), whole.double(), strength)
            assert (found - expected).norm() <= 1e-5 * (whole - W).norm()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in DENSE])
def test_a_file_for_comfyui_is_as_small_as_a_native_one(kind: str, model: Any, tmp_path: Path) -> None:
    free = kind.removesuffix("-xs")
    convert_adapter(golden(kind), tmp_path / "a.safetensors", "comfy", model)
    original, weights = load_adapter(golden(kind)), get_weights(model)
    layers = [
        KINDS[free].shapes(*weights[path].flatten(1).shape, original.spec.rank)
        for path in original.tensors
        if path.startswith("model.")
    ]
    alphas = 0 if original.spec.get_scale("") == 1 else len(layers)
    expected = alphas + sum(torch.Size(shape).numel() for layer in layers for shape in layer.values())
    assert sum(x.numel() for x in load_file(tmp_path / "a.safetensors").values()) == expected


@pytest.mark.parametrize("kind", ["lora", "dora-cols"])
def test_without_the_model_the_written_tensors_are_measured(kind: str, tmp_path: Path) -> None:
    done = convert_adapter(golden(kind), tmp_path / "a.safetensors", "comfy")
    assert done.measured == "tensors"
    assert done.error.relative < 1e-6
    assert load_adapter(tmp_path / "a.safetensors").spec.adapter_type == kind


@pytest.mark.parametrize("layer", ["linear", "conv1d"])
def test_comfyui_s_dora_becomes_ours_again(layer: str, tmp_path: Path) -> None:
    base: Any = Small(layer)
    original = train_adapter(AdapterSpec("dora-rows", rank=3, alpha=2.0), base)
    exported = export_to_comfy(original, get_weights(base), None)
    write_comfy(tmp_path / "comfy.safetensors", exported, None)
    done = convert_adapter(tmp_path / "comfy.safetensors", tmp_path / "back.safetensors", model=base, dtype="fp32")
    assert done.adapter.spec.adapter_type == "dora-rows"
    for path in done.adapter.tensors:
        W = get_weights(base)[path]
        one, other = (get_layer_adapter(each, path, W).weight(W) for each in (original, done.adapter))
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_columns_of_several_taps_are_dense_as_comfyui_has_one_norm_for_them(tmp_path: Path) -> None:
    base: Any = Small("conv1d")
    original, weights = train_adapter(AdapterSpec("dora-cols", rank=2), base), get_weights(base)
    write_comfy(tmp_path / "a.safetensors", export_to_comfy(original, weights, None), None)
    stored = load_file(tmp_path / "a.safetensors")
    for path in (path for path in original.tensors if path.startswith("model.")):
        whole = get_layer_adapter(original, path, weights[path]).weight(weights[path])
        found = play_as_comfyui(stored, path, weights[path], 1.0)
        torch.testing.assert_close(found.float(), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_peft_s_products_stay_factors(method: str, tmp_path: Path) -> None:
    base: Any = Small()
    adapter = train_adapter(AdapterSpec(method, rank=2, alpha=3.0), base)
    save_adapter(tmp_path / "peft", adapter, None)
    done = convert_adapter(tmp_path / "peft", tmp_path / "a.safetensors", "comfy", base, dtype="fp32")
    assert done.error.relative < 1e-5
    assert not any(key.endswith(".diff") for key in load_file(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("settings", "rank"), [({"rslora": True, "rank_pattern": {"up": 4}}, 4), ({"alpha_pattern": {"up": 6.0}}, 2)]
)
def test_several_scales_become_one_for_tools_that_know_one(settings: Any, rank: int, tmp_path: Path) -> None:
    base: Any = Small()
    adapter = train_adapter(AdapterSpec("dora-rows", rank=2, alpha=3.0, **settings), base)
    save_adapter(tmp_path / "a.safetensors", adapter, None)
    done = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", model=base, dtype="fp32")
    assert done.error.relative < 1e-6
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["lora_config"])
    assert config["rank"] == rank
    assert not {"rslora", "rank_pattern", "alpha_pattern"} & config.keys()
    assert {params["lora_A"].shape[0] for params in done.adapter.tensors.values()} == {rank}


def test_the_meta_device_reads_weights_as_they_are_needed(model: Any) -> None:
    loaded: Any = load_checkpoint(PLAIN, parts=("dit", "conditioner"))
    stored, weights = get_weights(model), get_weights(loaded)
    assert list(stored) == list(weights)
    assert all(torch.equal(stored[path], W) for path, W in weights.items())
    assert "model.nothing" not in stored
    with pytest.raises(KeyError):
        stored["model.nothing"]


def test_what_is_outside_the_dit_is_not_written_alone(tmp_path: Path) -> None:
    path = "conditioners.seconds_total.embedder.embedding.1"
    with pytest.raises(AdapterError, match="duration embedder"):
        write_comfy(tmp_path / "a.safetensors", Adapter(AdapterSpec("diff"), {path: {"diff_b": torch.ones(4)}}))
    save_file({"diffusion_model.a.oft_blocks": torch.ones(1, 2, 3)}, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="oft_blocks"):
        load_adapter(tmp_path / "b.safetensors")
