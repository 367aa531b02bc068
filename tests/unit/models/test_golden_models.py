"""Conditioning, DiT and SAME against the recorded outputs of the released implementation.

`SA3TRAIN_TEST_DEVICE=cuda` runs recorded cases there, here and in the other files of golden cases (launch/bench_gpu.sh
does).
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.golden import DEVICE, GOLDEN, GoldenSet
from sa3train.models import norms
from sa3train.models.checkpoint import StableAudio3, load_checkpoint

ROOT = GOLDEN
GOLDEN = {kind: GoldenSet(f"{kind}/cases") for kind in ("plain", "diff")}
TOLERANCE = 1e-4


def cases(*prefixes: str) -> list[tuple[str, str]]:
    return [(kind, name) for kind, golden in GOLDEN.items() for prefix in prefixes for name in golden.names(prefix)]


@pytest.fixture(scope="module")
def models() -> dict[str, StableAudio3]:
    return {kind: load_checkpoint(ROOT / kind, DEVICE) for kind in GOLDEN}


@pytest.fixture(autouse=True, params=[True, False], ids=["gradients", "inference"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients a CPU takes the passes of `sa3train.models.cpu_kernels`: they answer to the same values."""
    with torch.set_grad_enabled(request.param):
        yield


@pytest.fixture(params=[False, True], ids=["", "few passes"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The DiT as each device would compute it, and as a GPU does."""
    if request.param:
        monkeypatch.setattr(norms, "uses_fused_kernel", lambda x: True)


def recorded(kind: str, case: str) -> dict[str, Tensor]:
    return GOLDEN[kind].tensors(case, DEVICE)


@pytest.mark.parametrize(("kind", "case"), cases("conditioning"))
def test_conditioning(models: dict[str, StableAudio3], kind: str, case: str) -> None:
    tensors, settings = recorded(kind, case), GOLDEN[kind].settings(case)
    found = models[kind].conditioner(settings["prompts"], settings["seconds_total"])
    assert torch.equal(found.prompt_mask_BL, tensors["prompt_mask"])
    torch.testing.assert_close(found.cross_attn_cond_BLD, tensors["cross_attn_cond"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.global_cond_BD, tensors["global_cond"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("prepared", [False, True], ids=["forward", "prepared"])
@pytest.mark.parametrize(("kind", "case"), cases("dit.forward", "dit.padded"))
@pytest.mark.usefixtures("passes")
def test_dit(models: dict[str, StableAudio3], kind: str, case: str, prepared: bool) -> None:
    tensors = recorded(kind, case)
    dit = models[kind].dit
    conditions = {
        "cross_attn_cond_BLD": tensors["cross_attn_cond"],
        "global_cond_BD": tensors["global_cond"],
        "local_add_cond_BCT": tensors["local_add_cond"],
        "attention_mask_BT": tensors.get("padding_mask"),
    }
    x_BCT, t_B = tensors["x"], tensors["t"]
    if prepared:
        velocity_BCT = dit.predict_velocity(x_BCT, t_B, dit.prepare(x_BCT.shape, **conditions))
    else:
        velocity_BCT = dit(x_BCT, t_B, **conditions)
    real = tensors.get("padding_mask", torch.ones(1, 1, dtype=torch.bool, device=DEVICE))[:, None].expand_as(
        velocity_BCT
    )
    torch.testing.assert_close(velocity_BCT[real], tensors["velocity"][real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("kind", "case"), cases("same."))
def test_same(models: dict[str, StableAudio3], kind: str, case: str) -> None:
    tensors, settings = recorded(kind, case), GOLDEN[kind].settings(case)
    options: dict[str, Any] = {"chunked": "chunk_size" in settings, "noise": "manual_seed" in settings}
    options |= {key: settings[key] for key in ("chunk_size", "overlap") if key in settings}
    if options["noise"]:
        options["generator"] = torch.Generator().manual_seed(settings["manual_seed"])
    autoencoder = models[kind].autoencoder
    if "encode" in case:
        found, wanted = autoencoder.encode(tensors["audio"], **options), tensors["latents"]
    else:
        found, wanted = autoencoder.decode(tensors["latents"], **options), tensors["audio"]
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
