"""The singular vectors of `svd_bases.pt`, as the released trainer and Underfit store them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.small_model import Small
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.apply.svd_basis import attach_bases
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.errors import AdapterError

RANK = 4
LAYERS = ("model.transformer.layers.0.ff.up", "conditioners.seconds_total.embedder.embedding.1")


@pytest.fixture
def small() -> Small:
    return Small()


def get_weight(small: Small, path: str) -> torch.Tensor:
    weight: torch.Tensor = small.get_submodule(path).weight.detach()
    return weight


def make_adapter(**fields: Any) -> Adapter:
    rng = torch.Generator().manual_seed(0)
    tensors = {path: {"M_xs": torch.randn(RANK, RANK, generator=rng)} for path in LAYERS}
    return Adapter(AdapterSpec(**{"adapter_type": "lora-xs", "rank": RANK, **fields}), tensors, source="xs.safetensors")


def write_bases(path: Path, small: Small, **changes: Any) -> Path:
    """As the released tools: fp16 U and V by the key of the state dict. Signs are flipped, which only it tells."""
    bases = {}
    for layer in LAYERS:
        U, S, Vh = torch.linalg.svd(get_weight(small, layer), full_matrices=False)
        key = f"{'model' if layer.startswith('model.') else 'conditioner'}.{layer}.weight"
        bases[key] = {"U": -U.half(), "V": Vh.T.half(), "S": S, "shape": list(U.shape)} | changes
    torch.save(bases, path)
    return path


def test_the_bases_of_the_file_count(small: Small, tmp_path: Path) -> None:
    path = write_bases(tmp_path / "svd_bases.pt", small)
    before = {layer: get_weight(small, layer).clone() for layer in LAYERS}
    adapter = attach_bases(make_adapter(), path, before)
    stack = AdapterStack(small)
    stack.add(adapter)
    stack.apply()
    for layer, W in before.items():
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        change = -U[:, :RANK] @ adapter.tensors[layer]["M_xs"] @ Vh[:RANK]
        assert (get_weight(small, layer) - W - change).abs().max() <= 2e-3 * change.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"U": torch.zeros(20, 12)}, "not orthonormal"),
        ({"U": torch.eye(20, 3), "V": torch.eye(12, 3)}, "fewer than the rank 4"),
        ({"V": torch.eye(9, 9)}, "shape"),
        ({"U": torch.eye(20, 12), "V": torch.eye(12, 12)}, "not those of this model"),
        ({"V": "text"}, "has no bases"),
    ],
)
def test_other_bases_are_refused(small: Small, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_bases(tmp_path / "svd_bases.pt", small, **changes)
    with pytest.raises(AdapterError, match=message):
        attach_bases(make_adapter(), path, {layer: get_weight(small, layer) for layer in LAYERS})


def test_a_file_without_effect_or_with_code_is_refused(small: Small, tmp_path: Path) -> None:
    path = write_bases(tmp_path / "svd_bases.pt", small)
    with pytest.raises(AdapterError, match="no effect"):
        attach_bases(attach_bases(make_adapter(), path), path)
    with pytest.raises(AdapterError, match="no effect"):
        attach_bases(make_adapter(adapter_type="lora"), path)
    torch.save({"model": Path()}, path)
    with pytest.raises(AdapterError, match="weights-only"):
        attach_bases(make_adapter(), path)
    torch.save([1], path)
    with pytest.raises(AdapterError, match="list"):
        attach_bases(make_adapter(), path)
    with pytest.raises(AdapterError, match="refused"):
        attach_bases(make_adapter(), tmp_path / "none.pt")
