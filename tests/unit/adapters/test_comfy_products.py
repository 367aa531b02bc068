"""LoHa, LoKr and OFT layers of ComfyUI's files: they stay factors until a weight is made of them."""

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sa3train.adapters.apply.layer_weight import get_layer_adapter
from sa3train.adapters.formats.comfy import read_comfy
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.tools.inspect import inspect_adapter
from sa3train.core.errors import AdapterError

KEY, PATH = "diffusion_model.transformer.project_in", "model.transformer.project_in"


def changed(tensors: dict[str, Tensor], shape: tuple[int, ...], key: str = KEY, path: str = PATH) -> Tensor:
    """What the file's layer adds to a weight of this shape."""
    adapter = read_comfy("file", {f"{key}.{name}": tensor for name, tensor in tensors.items()}, {})
    assert adapter.spec.adapter_type == "comfy"
    assert sum(x.numel() for x in adapter.tensors[path].values()) <= sum(x.numel() for x in tensors.values())
    norm = inspect_adapter(adapter).layers[path].norm
    W = torch.zeros(shape)
    assert norm == pytest.approx(float(get_layer_adapter(adapter, path, W).weight(W).norm()), rel=1e-5)
    return get_layer_adapter(adapter, path, W).weight(W)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (1.0, 0.5)])
def test_loha_is_the_elementwise_product_of_two_products(alpha: float | None, scale: float) -> None:
    a, b, c, d = (torch.randn(shape) for shape in ((6, 2), (2, 4), (6, 2), (2, 4)))
    tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha)
    torch.testing.assert_close(changed(tensors, (6, 4)), scale * (a @ b) * (c @ d))


@pytest.mark.parametrize(("split_1", "split_2"), product([False, True], repeat=2))
def test_lokr_is_the_kronecker_product_of_whole_or_split_factors(split_1: bool, split_2: bool) -> None:
    tensors, factors = {"alpha": torch.tensor(1.0)}, []
    for which, split, rank, (rows, columns) in (("1", split_1, 2, (2, 3)), ("2", split_2, 4, (5, 7))):
        a, b = torch.randn(rows, rank), torch.randn(rank, columns)
        factors.append(a @ b)
        tensors |= {f"lokr_w{which}_a": a, f"lokr_w{which}_b": b} if split else {f"lokr_w{which}": a @ b}
    scale = 1 / 4 if split_2 else 1 / 2 if split_1 else 1.0
    torch.testing.assert_close(changed(tensors, (10, 21)), scale * torch.kron(*factors))


@pytest.mark.parametrize(("bound", "strength"), [(None, 1.0), (0.0, 1.0), (0.3, 0.5)])
def test_oft_rotates_blocks_of_rows(bound: float | None, strength: float) -> None:
    """By hand: Cayley's rotation of each block, whose skew matrices together have a norm of at most alpha."""
    W, blocks = torch.randn(6, 5), torch.randn(2, 3, 3) * 0.3
    skew = blocks - blocks.mT
    if bound:
        skew = skew * bound / skew.norm()
    expected = W.clone()
    for block, rows in zip(skew, (slice(0, 3), slice(3, 6)), strict=True):
        rotation = (torch.eye(3) + block) @ torch.linalg.inv(torch.eye(3) - block)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(3))
        expected[rows] = rotation.T @ W[rows]
    tensors = {"oft_blocks": blocks} | ({} if bound is None else {"alpha": torch.tensor(bound)})
    adapter = read_comfy("file", {f"{KEY}.{name}": tensor for name, tensor in tensors.items()}, {})
    found = get_layer_adapter(adapter, PATH, W).weight(W, strength)
    torch.testing.assert_close(found, W + strength * (expected - W))
    assert inspect_adapter(adapter).layers[PATH].norm is None


@pytest.mark.parametrize("axis", [0, 1])
def test_a_product_may_have_a_dora_scale(axis: int) -> None:
    W, w1, w2 = torch.randn(6, 4), torch.randn(2, 2), torch.randn(3, 2)
    V = W + torch.kron(w1, w2)
    norms = (V if axis == 0 else W).norm(dim=axis, keepdim=True)
    tensors = {"lokr_w1": w1, "lokr_w2": w2, "dora_scale": norms * 1.2}
    adapter = read_comfy("file", {f"{KEY}.{name}": tensor for name, tensor in tensors.items()}, {})
    torch.testing.assert_close(get_layer_adapter(adapter, PATH, W).weight(W), 1.2 * V)


def test_a_convolution_gets_its_last_dimension_back() -> None:
    w1, w2 = torch.randn(2, 2), torch.randn(3, 2, 1)
    found = changed({"lokr_w1": w1, "lokr_w2": w2}, (6, 4, 1), "lora_unet_preprocess_conv", "model.preprocess_conv")
    torch.testing.assert_close(found, torch.kron(w1, w2[:, :, 0])[:, :, None])


def test_a_file_is_told_by_these_keys_and_may_have_lora_layers_too(tmp_path: Path) -> None:
    up, down = torch.randn(3, 2), torch.randn(2, 4)
    stored = {
        f"{KEY}.lokr_w1": torch.ones(1, 2),
        f"{KEY}.lokr_w2": torch.ones(3, 2),
        "diffusion_model.transformer.project_out.lora_up.weight": up,
        "diffusion_model.transformer.project_out.lora_down.weight": down,
    }
    save_file(stored, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    W = torch.zeros(3, 4)
    torch.testing.assert_close(get_layer_adapter(adapter, PATH, W).weight(W), torch.ones(3, 4))
    torch.testing.assert_close(get_layer_adapter(adapter, "model.transformer.project_out", W).weight(W), up @ down)


M22, M32 = torch.ones(2, 2), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"hada_w1_a": M22}, "fit together"),
        ({"hada_w1_a": M22, "hada_w1_b": M22, "hada_w2_a": M32, "hada_w2_b": M22}, "have the shapes"),
        ({"hada_w1_a": M22, "hada_w1_b": M32, "hada_w2_a": M22, "hada_w2_b": M22}, "fit together"),
        ({"lokr_w1": M22}, "fit together"),
        ({"lokr_w1": M22, "lokr_w2_a": M22}, "fit together"),
        ({"lokr_w1": M22, "lokr_w1_a": M22, "lokr_w2": M22}, "fit together"),
        ({"lokr_w1": M22, "lokr_w2": torch.ones(4)}, "must be a matrix"),
        ({"lokr_w1": M22, "lokr_w2": M22, "dora_scale": M22}, "does not fit"),
        ({"oft_blocks": M22}, "square matrices"),
        ({"oft_blocks": torch.ones(1, 1, 2, 2)}, "BOFT"),
        ({"oft_blocks": torch.ones(1, 4, 4), "dora_scale": torch.ones(4, 1)}, "alone"),
        ({"oft_blocks": torch.ones(1, 4, 4), "rescale": torch.ones(4, 1)}, "is not supported"),
        ({"lokr_w1": M22, "lokr_w2": M22, "lora_up.weight": M22}, "is not supported"),
        ({"lokr_t2": M22, "lokr_w1": M22}, "is not supported"),
        ({"lokr_w1": torch.ones(200, 200), "lokr_w2": torch.ones(200, 200)}, "no model is as large"),
    ],
)
def test_what_does_not_fit_is_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        changed(tensors, (4, 4))
