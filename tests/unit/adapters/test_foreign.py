"""Adapters from elsewhere: played as their makers play them, or refused with the reason and the way on."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.golden import PLAIN
from helpers.small_model import Small, train_adapter
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.layer_weight import get_layer_adapter
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.adapters.tools import Truncation, convert_adapter, inspect_adapter, merge_adapters
from sa3train.adapters.tools.service import resize_adapter, scale_adapter
from sa3train.core.errors import AdapterError
from sa3train.models.checkpoint import load_checkpoint

QKV = "transformer.layers.0.self_attn.to_qkv"
FF = "transformer.layers.0.ff.ff.2"
EMBEDDER = "conditioners.seconds_total.embedder.embedding.1"
RANK = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return load_checkpoint(PLAIN, parts=("dit", "conditioner"))


@pytest.fixture(scope="module")
def weights(model: Any) -> dict[str, Tensor]:
    layers: dict[str, Any] = find_adaptable_layers(model.get_adapter_root())
    return {path: layer.weight.detach() for path, layer in layers.items()}


@pytest.fixture
def factors(weights: dict[str, Tensor]) -> Callable[[str], tuple[Tensor, Tensor]]:
    """Random A and B for a layer."""
    rng = torch.Generator().manual_seed(0)

    def draw(path: str) -> tuple[Tensor, Tensor]:
        rows, cols = weights[path].flatten(1).shape
        return torch.randn(RANK, cols, generator=rng) * 0.05, torch.randn(rows, RANK, generator=rng) * 0.05

    return draw


def play(adapter: Adapter, model: Any, strength: float = 1.0) -> dict[str, Tensor]:
    """The weights and biases of the layers that an adapter changes, with it."""
    root = model.get_adapter_root()
    stack = AdapterStack(root)
    stack.add(adapter, strength, allow_partial=True)
    stack.apply()
    layers: dict[str, Any] = find_adaptable_layers(root)
    found = {f"{path}.weight": layers[path].weight.detach().clone() for path in adapter.tensors}
    found |= {f"{path}.bias": layers[path].bias.clone() for path in adapter.tensors if layers[path].bias is not None}
    stack.clear()
    return found


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.3])
@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_comfy_dora_is_played_as_comfyui_plays_it(
    axis: str, strength: float, model: Any, weights: dict[str, Tensor], factors: Any, tmp_path: Path
) -> None:
    """ComfyUI 0.19.3 divides columns by the norms of W + BA, and rows by those of W."""
    W, (A, B) = weights[f"model.{QKV}"], factors(f"model.{QKV}")
    V = W + B @ A / 2
    norms = V.norm(dim=0, keepdim=True) if axis == "columns" else W.norm(dim=1, keepdim=True)
    scale = norms * (1 + 0.1 * torch.rand(norms.shape, generator=torch.Generator().manual_seed(1)))
    tensors = {"lora_up.weight": B, "lora_down.weight": A, "alpha": torch.tensor(RANK / 2), "dora_scale": scale}
    save_file({f"diffusion_model.{QKV}.{name}": x for name, x in tensors.items()}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    found = play(adapter, model, strength)[f"model.{QKV}.weight"]
    torch.testing.assert_close(found, W + strength * (V * scale / norms - W), atol=1e-6, rtol=0)
    assert adapter.spec.adapter_type == ("dora-cols" if axis == "columns" else "comfy")


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_"])
def test_lycoris_and_onetrainer_divide_rows_by_the_norms_of_the_sum(
    prefix: str, model: Any, weights: dict[str, Tensor], factors: Any, tmp_path: Path
) -> None:
    W, (A, B), (a, b) = weights[f"model.{QKV}"], factors(f"model.{QKV}"), factors(f"model.{FF}")
    V, scale = W + B @ A, W.norm(dim=1, keepdim=True) * 1.1
    stored = {f"{prefix}{FLAT}.lora_up.weight": B, f"{prefix}{FLAT}.lora_down.weight": A}
    stored[f"{prefix}{FLAT}.dora_scale"] = scale
    save_file(stored, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert adapter.spec.adapter_type == "dora-rows"  # which can be trained further
    found = play(adapter, model)[f"model.{QKV}.weight"]
    torch.testing.assert_close(found, scale * V / V.norm(dim=1, keepdim=True), atol=1e-6, rtol=0)
    plain = f"{prefix}{FF.replace('.', '_')}"
    save_file(stored | {f"{plain}.lora_up.weight": b, f"{plain}.lora_down.weight": a}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="beside lora"):
        load_adapter(tmp_path / "a.safetensors")


def test_layers_of_a_comfy_dora_may_be_plain(model: Any, weights: dict[str, Tensor], factors: Any) -> None:
    from sa3train.adapters.formats.comfy import read_comfy

    W, (A, B), (a, b) = weights[f"model.{QKV}"], factors(f"model.{QKV}"), factors(f"model.{FF}")
    scale = (W + B @ A).norm(dim=0, keepdim=True) * 1.1
    tensors = {f"diffusion_model.{QKV}.{name}": x for name, x in (("lora_up.weight", B), ("lora_down.weight", A))}
    tensors |= {f"diffusion_model.{FF}.{name}": x for name, x in (("lora_up.weight", b), ("lora_down.weight", a))}
    found = play(read_comfy("file", tensors | {f"diffusion_model.{QKV}.dora_scale": scale}, {}), model)
    torch.testing.assert_close(found[f"model.{FF}.weight"], weights[f"model.{FF}"] + b @ a, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[f"model.{QKV}.weight"], 1.1 * (W + B @ A), atol=1e-5, rtol=0)


@pytest.fixture
def trained_in_comfy(factors: Any, tmp_path: Path) -> Path:
    """What ComfyUI's trainer saves: changes of biases, and the duration embedder under ComfyUI's name."""
    names = {f"model.{QKV}": f"diffusion_model.{QKV}", f"model.{FF}": f"diffusion_model.{FF}"}
    names[EMBEDDER] = "seconds_total_embedder.embedder.embedding.1"
    stored = {}
    for path, key in names.items():
        A, B = factors(path)
        stored |= {f"{key}.lora_up.weight": B, f"{key}.lora_down.weight": A, f"{key}.alpha": torch.tensor(1.0)}
        if path != f"model.{QKV}":
            stored[f"{key}.diff_b"] = torch.linspace(-0.1, 0.2, len(B))
    save_file({key: tensor.bfloat16() for key, tensor in stored.items()}, tmp_path / "trained.safetensors")
    return tmp_path / "trained.safetensors"


def test_a_file_of_comfyui_s_trainer_stays_low_rank(trained_in_comfy: Path, model: Any, weights: Any) -> None:
    adapter = load_adapter(trained_in_comfy)
    assert (adapter.spec.adapter_type, adapter.spec.rank, len(adapter.tensors)) == ("lora", RANK, 3)
    assert (
        sum(x.nbytes for params in adapter.tensors.values() for x in params.values()) < trained_in_comfy.stat().st_size
    )
    found = play(adapter, model, 0.5)
    layers: dict[str, Any] = find_adaptable_layers(model.get_adapter_root())
    for path, params in adapter.tensors.items():
        W = weights[path] + 0.5 / RANK * params["lora_B"].float() @ params["lora_A"].float()
        torch.testing.assert_close(found[f"{path}.weight"], W, atol=1e-6, rtol=0)
        if "diff_b" in params:
            torch.testing.assert_close(found[f"{path}.bias"], layers[path].bias + 0.5 * params["diff_b"].float())


def test_the_tools_keep_changes_of_biases_or_say_that_they_do_not(
    trained_in_comfy: Path, model: Any, tmp_path: Path
) -> None:
    original = play(load_adapter(trained_in_comfy), model)
    convert_adapter(trained_in_comfy, tmp_path / "native.safetensors", dtype="fp32")
    resize_adapter(trained_in_comfy, tmp_path / "resized.safetensors", Truncation(RANK), dtype="fp32")
    scale_adapter(trained_in_comfy, tmp_path / "scaled.safetensors", 2.0, dtype="fp32")
    for name, strength in (("native", 1.0), ("resized", 1.0), ("scaled", 0.5)):
        found = play(load_adapter(tmp_path / f"{name}.safetensors"), model, strength)
        assert found.keys() == original.keys()
        for key, tensor in original.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=0)
    comfy = convert_adapter(trained_in_comfy, tmp_path / "comfy.safetensors", "comfy", dtype="fp32")
    assert any(EMBEDDER in text for text in comfy.warnings)
    found = play(load_adapter(tmp_path / "comfy.safetensors"), model)
    assert all(torch.equal(original[key], tensor) for key, tensor in found.items())
    assert f"model.{FF}.bias" in found
    with pytest.raises(AdapterError, match="changes of biases"):
        convert_adapter(trained_in_comfy, tmp_path / "peft", "peft")
    approximate = convert_adapter(trained_in_comfy, tmp_path / "peft", "peft", truncation=Truncation(RANK))
    assert any("bias" in text for text in approximate.warnings)
    assert not inspect_adapter(trained_in_comfy, model).problems
    merge_adapters([(trained_in_comfy, 1.0)], tmp_path / "merged", model)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(stored[f"model.model.{FF}.bias"], original[f"model.{FF}.bias"].bfloat16())


def test_a_change_of_a_norm_is_refused_or_left_out_by_choice(trained_in_comfy: Path, model: Any) -> None:
    """ComfyUI's trainer also trains norms where the model has weights in them; adapters here change other layers."""
    stored = load_file(trained_in_comfy) | {"diffusion_model.transformer.layers.0.pre_norm.diff": torch.ones(8)}
    save_file(stored, trained_in_comfy)
    adapter, stack = load_adapter(trained_in_comfy), AdapterStack(model.get_adapter_root())
    with pytest.raises(AdapterError, match=r"pre_norm.*allow_partial"):
        stack.add(adapter)
    assert stack.add(adapter, allow_partial=True).unexpected == ["model.transformer.layers.0.pre_norm"]


def test_an_adapter_that_changes_only_biases_has_an_effect(model: Any) -> None:
    only = Adapter(
        AdapterSpec("lora"), {f"model.{FF}": {"diff_b": torch.ones(model.dit.state_dict()[f"{FF}.bias"].shape)}}
    )
    assert AdapterStack(model.get_adapter_root()).add(only).matched == [f"model.{FF}"]


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_an_xs_adapter_s_own_bases_count(suffix: str, model: Any, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path, rng = f"model.{QKV}", torch.Generator().manual_seed(0)
    W = weights[path]
    U, _, Vh = torch.linalg.svd(W + 0.05 * torch.randn(W.shape, generator=rng), full_matrices=False)
    M = torch.randn(RANK, RANK, generator=rng) * 0.05
    tensors = {"M_xs": M, "U": U[:, :RANK].contiguous(), "V": Vh[:RANK].T.contiguous()}
    stored = {f"{path}.parametrizations.weight.0.{name}": tensor for name, tensor in tensors.items()}
    config = json.dumps({"rank": RANK, "alpha": RANK, "adapter_type": "lora-xs"})
    file, native = tmp_path / f"a{suffix}", tmp_path / "native.safetensors"
    if suffix == ".safetensors":
        save_file(stored, file, {"lora_config": config})
    else:
        torch.save({"state_dict": {f"diffusion.{key}": x for key, x in stored.items()}, "lora_config": config}, file)
    convert_adapter(file, native, dtype="fp32")
    convert_adapter(native, tmp_path / "peft", dtype="fp32")  # needs no model
    resize_adapter(native, tmp_path / "resized.safetensors", Truncation(RANK), dtype="fp32")
    for converted in (native, tmp_path / "peft", tmp_path / "resized.safetensors"):
        found = play(load_adapter(converted), model)[f"{path}.weight"]
        torch.testing.assert_close(found, W + U[:, :RANK] @ M @ Vh[:RANK], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "content", "scale"),
    [
        ("a.json", {"rank": RANK, "alpha": 8, "adapter_type": "lora"}, 2.0),
        ("a.json", {"alpha": 8}, 2.0),
        ("a.safetensors.json", {"lora_config": {"alpha": 2}}, 0.5),
        ("a.json", {"activation text": "zing", "preferred weight": 0.7}, 1.0),
        ("b.json", {"alpha": 8}, 1.0),
    ],
)
def test_settings_in_a_json_beside_the_file_count(
    name: str, content: dict[str, Any], scale: float, factors: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    A, B = factors(f"model.{QKV}")
    stored = {f"model.{QKV}.parametrizations.weight.0.{name}": x for name, x in (("lora_A", A), ("lora_B", B))}
    save_file(stored, tmp_path / "a.safetensors")
    torch.save(stored, tmp_path / "a.pt")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    with caplog.at_level(logging.WARNING, "sa3train"):
        assert load_adapter(tmp_path / "a.safetensors").spec.get_scale(f"model.{QKV}") == scale
    assert ("a.json names no alpha" in caplog.text) == ("preferred weight" in content)
    if name == "a.json":
        done = convert_adapter(tmp_path / "a.pt", tmp_path / "c.safetensors")
        assert done.adapter.spec.get_scale(f"model.{QKV}") == scale
    save_file(stored, tmp_path / "a.safetensors", {"lora_config": json.dumps({"rank": RANK, "alpha": RANK * 3})})
    assert load_adapter(tmp_path / "a.safetensors").spec.get_scale(f"model.{QKV}") == 3.0


def test_a_json_beside_the_file_that_cannot_be_read_is_named(factors: Any, tmp_path: Path) -> None:
    A, B = factors(f"model.{QKV}")
    save_file(
        {f"model.{QKV}.parametrizations.weight.0.{name}": x for name, x in (("lora_A", A), ("lora_B", B))},
        tmp_path / "a.safetensors",
    )
    for text in ("{", '{"alpha": "x"}', '{"alpha": NaN}', '{"rank": 0}', '{"adapter_type": "odd"}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(AdapterError, match=r"a\.(json|safetensors)"):
            load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_peft_may_have_wrapped_the_dit_or_what_holds_it(depth: int, factors: Any, tmp_path: Path) -> None:
    A, B = factors(f"model.{QKV}")
    prefix = f"base_model.model.{'model.' * depth}"
    stored = {f"{prefix}{QKV}.lora_A.weight": A, f"{prefix}{QKV}.lora_B.weight": B}
    if depth == 2:
        a, b = factors(EMBEDDER)
        name = f"base_model.model.conditioner.{EMBEDDER}"
        stored |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file(stored, tmp_path / "adapter_model.safetensors")
    pattern = f"{'model.' * depth}{QKV}".replace(".", r"\.")
    config = {"peft_type": "LORA", "lora_alpha": RANK, "alpha_pattern": {pattern: 2 * RANK}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = load_adapter(tmp_path)
    assert adapter.tensors.keys() == {f"model.{QKV}", *([EMBEDDER] if depth == 2 else [])}
    assert adapter.spec.get_scale(f"model.{QKV}") == 2.0
    assert adapter.spec.get_scale(EMBEDDER) == 1.0 or depth < 2


FLAT = QKV.replace(".", "_")
NAMES = [
    (f"lora_unet_{FLAT}", "lora_up.weight", "lora_down.weight"),
    (f"lycoris_{FLAT}", "lora_up.weight", "lora_down.weight"),
    (f"lycoris_model_{FLAT}", "lora_up.weight", "lora_down.weight"),
    (f"lora_transformer_{FLAT.removeprefix('transformer_')}", "lora_up.weight", "lora_down.weight"),
    (f"lora_transformer_{FLAT}", "lora_up.weight", "lora_down.weight"),
    (QKV, "lora_B.weight", "lora_A.weight"),
    (QKV, "lora_B.default.weight", "lora_A.default.weight"),
    (f"model.{QKV}", "lora_up.weight", "lora_down.weight"),
    (f"module.{QKV}", "lora_up.weight", "lora_down.weight"),
    (f"model.model.{QKV}", "lora_B", "lora_A"),
    (f"model.diffusion_model.{QKV}", "lora.up.weight", "lora.down.weight"),
    (f"diffusion_model.{QKV}", "lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    (f"model.model.{QKV}.parametrizations.weight.0", "lora_B", "lora_A"),
    (f"module.model.{QKV}.parametrizations.weight.0", "lora_B", "lora_A"),
    (f"_orig_mod.model._orig_mod.{QKV}.parametrizations.weight.0", "lora_B", "lora_A"),
]


@pytest.mark.parametrize(("layer", "up", "down"), NAMES)
def test_names_that_other_tools_write_are_understood(
    layer: str, up: str, down: str, factors: Any, tmp_path: Path
) -> None:
    A, B = factors(f"model.{QKV}")
    save_file({f"{layer}.{up}": B, f"{layer}.{down}": A}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert list(adapter.tensors) == [f"model.{QKV}"]
    assert torch.equal(adapter.tensors[f"model.{QKV}"]["lora_A"], A)
    assert adapter.spec.get_scale(f"model.{QKV}") == 1.0


def test_the_duration_embedder_is_found_under_flat_names(factors: Any, tmp_path: Path) -> None:
    A, B = factors(EMBEDDER)
    name = f"lycoris_conditioner_{EMBEDDER.replace('.', '_')}"
    save_file({f"{name}.lora_up.weight": B, f"{name}.lora_down.weight": A}, tmp_path / "a.safetensors")
    assert list(load_adapter(tmp_path / "a.safetensors").tensors) == [EMBEDDER]


def test_a_pipe_beside_an_adapter_is_not_waited_for(tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft", train_adapter(AdapterSpec("lora", rank=2), Small()))
    (tmp_path / "peft" / "adapter_config.json").unlink()
    os.mkfifo(tmp_path / "peft" / "adapter_config.json")
    with pytest.raises(AdapterError, match="pipe"):
        load_adapter(tmp_path / "peft")


def test_diffusers_scale_stands_in_the_metadata(factors: Any, tmp_path: Path) -> None:
    A, B = factors(f"model.{QKV}")
    for settings, scale in (
        ({"transformer.r": RANK, "transformer.lora_alpha": 12}, 3.0),
        ({"transformer.r": RANK, "transformer.lora_alpha": 12, "transformer.use_rslora": True}, 6.0),
        ({"transformer.r": 8, "transformer.lora_alpha": 12, "transformer.alpha_pattern": {"to_qkv": 4}}, 1.0),
        ({}, 1.0),
    ):
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
        save_file({f"{QKV}.lora_B.weight": B, f"{QKV}.lora_A.weight": A}, tmp_path / "a.safetensors", metadata)
        assert load_adapter(tmp_path / "a.safetensors").spec.get_scale(f"model.{QKV}") == scale
    magnitude = {f"{QKV}.lora_magnitude_vector": torch.ones(len(B))}
    for settings, more, outcome in (
        ({"transformer.use_dora": True}, magnitude, "dora-rows"),
        ({"transformer.init_lora_weights": "pissa"}, {}, "sa3-adapter convert"),
        ({"transformer.use_dora": True}, {}, "use_dora"),
        ({"transformer.lora_alpha": [2]}, {}, r"a\.safetensors.*alpha"),
        ({"transformer.lora_alpha": 0}, {}, r"a\.safetensors.*alpha"),
    ):
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
        stored = {f"{QKV}.lora_B.weight": B, f"{QKV}.lora_A.weight": A} | more
        save_file(stored, tmp_path / "a.safetensors", metadata)
        if outcome == "dora-rows":
            assert load_adapter(tmp_path / "a.safetensors").spec.adapter_type == outcome
            continue
        with pytest.raises(AdapterError, match=outcome):
            load_adapter(tmp_path / "a.safetensors")


NATIVE = f"model.{QKV}.parametrizations.weight"
REFUSED = [
    ([f"{NATIVE}.0", f"{NATIVE}.1"], "2 adapters on the same layers"),
    ([f"{NATIVE}.0", f"diffusion_model.{QKV}"], "2 adapters, named as"),
    ([f"diffusion_model.{QKV}", f"lora_unet_{FLAT}"], "two adapters on the same layer"),
    ([f"model.{QKV}", f"model.model.{QKV}"], "two adapters on the same layer"),
    (["pretransform.model.encoder.layers.0.conv.parametrizations.weight.0"], "on the autoencoder"),
    (["lora_te_text_model_encoder_layers_0_mlp_fc1"], "the text encoder"),
    (["text_encoder.encoder.block.0.layer.0.SelfAttention.q", f"diffusion_model.{QKV}"], "the text encoder"),
    (["transformer.transformer_blocks.0.self_attn.to_q"], "diffusers"),
    (["lora_unet_down_blocks_0_attentions_0_proj_in"], "kohya.*made for another model"),
    (["lycoris_double_blocks_0_img_attn_qkv"], "LyCORIS.*made for another model"),
]


@pytest.mark.parametrize(("layers", "message"), REFUSED)
def test_what_cannot_be_played_is_named(layers: list[str], message: str, tmp_path: Path) -> None:
    stored = {}
    for layer in layers:
        ends = ("lora_A", "lora_B") if "parametrizations" in layer else ("lora_A.weight", "lora_B.weight")
        stored |= {f"{layer}.{ends[0]}": torch.ones(2, 4), f"{layer}.{ends[1]}": torch.ones(4, 2)}
    save_file(stored, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path / "a.safetensors")
    torch.save(stored, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match=message):
        convert_adapter(tmp_path / "a.pt", tmp_path / "b.safetensors")


def test_two_adapters_of_peft_in_one_file_are_refused(tmp_path: Path) -> None:
    layer = f"base_model.model.{QKV}"
    stored = {
        f"{layer}.lora_{letter}.{name}.weight": torch.ones(4, 4) for letter in "AB" for name in ("default", "second")
    }
    save_file(stored, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(AdapterError, match="default, second"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gguf", b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
        ("a.safetensors", b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
        ("a.npz", b"PK\x03\x04" + bytes(64), "NumPy"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS"),
        ("a.safetensors", b"<!DOCTYPE html><html><title>404</title>", "web page"),
        ("a.safetensors", b'{"error":"Invalid username or password."}', "error message"),
        ("a.safetensors", b"PK\x03\x04" + bytes(64), r"Rename it to a\.ckpt"),
        ("a.safetensors", b"\x80\x02}q.", r"Rename it to a\.ckpt"),
        ("a.pt", b"\x80", "is a pickle"),
    ],
)
def test_other_containers_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path / name)


def test_mlx_lm_and_whole_checkpoints_are_told_apart(tmp_path: Path) -> None:
    for key, message in (
        (f"model.{QKV}.lora_a", "mlx-lm"),
        (f"model.model.{QKV}.weight", "checkpoint"),
        ("a", "no ad"),
    ):
        save_file({key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
        with pytest.raises(AdapterError, match=message):
            load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("adapter_type", ["diff", "bora", "dora", "lora-xs", "dora-rows-xs"])
def test_a_type_that_the_tensors_contradict_is_refused(adapter_type: str, factors: Any, tmp_path: Path) -> None:
    A, B = factors(f"model.{QKV}")
    stored = {f"{NATIVE}.0.lora_A": A, f"{NATIVE}.0.lora_B": B}
    for config in ({"rank": RANK, "adapter_type": adapter_type}, {"adapter_type": adapter_type}):
        save_file(stored, tmp_path / "a.safetensors", {"lora_config": json.dumps(config)})
        with pytest.raises(AdapterError, match=r"a\.safetensors"):
            load_adapter(tmp_path / "a.safetensors")


def test_a_native_file_may_be_one_of_comfyui_s_dora(model: Any, weights: Any, factors: Any, tmp_path: Path) -> None:
    (A, B), W = factors(f"model.{QKV}"), weights[f"model.{QKV}"]
    config = {"lora_config": json.dumps({"rank": RANK, "adapter_type": "comfy"})}
    for shape, fits in (((len(B), 1), True), ((1, A.shape[1]), True), ((), False), ((len(B),), False), ((3, 1), False)):
        stored = {"lora_A": A, "lora_B": B, "magnitude": torch.full(shape, 0.5)}
        save_file({f"{NATIVE}.0.{name}": x for name, x in stored.items()}, tmp_path / "a.safetensors", config)
        if fits:
            assert not torch.equal(play(load_adapter(tmp_path / "a.safetensors"), model)[f"model.{QKV}.weight"], W)
            continue
        with pytest.raises(AdapterError, match="magnitude"):
            play(load_adapter(tmp_path / "a.safetensors"), model)


@pytest.mark.parametrize("setting", ["include", "exclude", "rank_pattern", "alpha_pattern"])
def test_the_number_of_patterns_is_bounded(setting: str) -> None:
    many = [f"layers.{number}" for number in range(2000)]
    with pytest.raises(AdapterError, match="2000 layer patterns"):
        AdapterSpec("lora", **{setting: dict.fromkeys(many, 2) if setting.endswith("pattern") else many})
    with pytest.raises(AdapterError, match="ranges"):
        AdapterSpec("lora", **{setting: {"[0-9]." * 5: 2} if setting.endswith("pattern") else ["[0-9]." * 5]})
    AdapterSpec("lora", include=many[:1000])


@pytest.mark.parametrize("change", ["bases", "bias", "type"])
def test_training_starts_only_from_what_it_can_continue(change: str) -> None:
    spec = AdapterSpec("lora-xs" if change == "bases" else "lora", rank=2)
    adapter = train_adapter(spec, Small())
    path, params = next(iter(adapter.tensors.items()))
    extra = {
        "bases": {"U": torch.ones(20, 2), "V": torch.ones(12, 2)},
        "bias": {"diff_b": torch.ones(20)},
        "type": {},
    }[change]
    changed = Adapter(adapter.spec, {**adapter.tensors, path: {**params, **extra}}, {}, "file")
    if change == "type":
        changed = Adapter(AdapterSpec("comfy", rank=2), adapter.tensors, {}, "file")
    with pytest.raises(AdapterError, match="sa3-adapter merge"):
        inject(Small(), spec).load(changed)


def test_whole_alphas_of_any_form_are_read(weights: dict[str, Tensor], factors: Any, tmp_path: Path) -> None:
    A, B = factors(f"model.{QKV}")
    key, W = f"diffusion_model.{QKV}", weights[f"model.{QKV}"]
    for alpha in (
        torch.tensor(8),
        torch.tensor([8.0]),
        torch.tensor([[8]], dtype=torch.uint8),
        torch.tensor(8.0).half(),
    ):
        save_file({f"{key}.lora_up.weight": B, f"{key}.lora_down.weight": A, f"{key}.alpha": alpha}, tmp_path / "a.st")
        found = get_layer_adapter(load_adapter(tmp_path / "a.st"), f"model.{QKV}", W).weight(W)
        torch.testing.assert_close(found, W + 2 * B @ A)
    for alpha in (torch.tensor(float("nan")), torch.tensor(0), torch.ones(2), torch.ones(0), torch.tensor(1e30)):
        save_file({f"{key}.lora_up.weight": B, f"{key}.lora_down.weight": A, f"{key}.alpha": alpha}, tmp_path / "a.st")
        with pytest.raises(AdapterError, match=r"a\.st.*alpha"):
            load_adapter(tmp_path / "a.st")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_read_exactly(dtype: torch.dtype, factors: Any, tmp_path: Path) -> None:
    A, B = (tensor.to(dtype) for tensor in factors(f"model.{QKV}"))
    save_file({f"{NATIVE}.0.lora_A": A, f"{NATIVE}.0.lora_B": B}, tmp_path / "a.safetensors")
    found = load_adapter(tmp_path / "a.safetensors").tensors[f"model.{QKV}"]
    assert torch.equal(found["lora_A"].float(), A.float())
    assert torch.equal(found["lora_B"].float(), B.float())
