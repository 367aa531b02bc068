"""Padding, packing, preparing and precision of the DiT."""

import pytest
import torch
from torch import Tensor

from helpers.golden import GOLDEN
from sa3train.models.attention import force_backend
from sa3train.models.checkpoint import load_checkpoint
from sa3train.models.dit import DiT
from sa3train.models.packing import make_packed_layout

ROOT = GOLDEN
LENGTHS = (17, 5, 1, 30)
#: Two rows of 40 frames: clip 2 and clip 0 in the first, clip 3 and clip 1 in the second, the rest padding.
PLACES = {2: (0, 0), 0: (0, 3), 3: (1, 0), 1: (1, 30)}
ROWS, FRAMES = 2, 40


@pytest.fixture(scope="module", params=["plain", "diff"])
def dit(request: pytest.FixtureRequest) -> DiT:
    return load_checkpoint(ROOT / request.param, parts=("dit",)).dit


def clips(seed: int = 0) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    return {
        "x": [draw(64, length) for length in LENGTHS],
        "local": [draw(65, length) for length in LENGTHS],
        "context": [draw(25, 768) for _ in LENGTHS],
        "globals": [draw(768) for _ in LENGTHS],
        "t": [torch.rand(1, generator=generator) for _ in LENGTHS],
    }


def pack(parts: list[Tensor], fill: float) -> Tensor:
    rows = torch.full((ROWS, parts[0].shape[1], FRAMES), fill)
    for index, (row, start) in PLACES.items():
        rows[row, :, start : start + LENGTHS[index]] = parts[index]
    return rows


def segment_ids() -> Tensor:
    ids = torch.full((ROWS, FRAMES), -1)
    for index, (row, start) in PLACES.items():
        ids[row, start : start + LENGTHS[index]] = index
    return ids


def run_packed(dit: DiT, given: dict[str, list[Tensor]], fill: float = 7.0) -> Tensor:
    return dit(
        pack(given["x"], fill),
        torch.cat(given["t"]),
        cross_attn_cond_BLD=torch.cat(given["context"]),
        global_cond_BD=torch.cat(given["globals"]),
        local_add_cond_BCT=pack(given["local"], fill),
        segment_ids=segment_ids(),
    )


def run_alone(dit: DiT, given: dict[str, list[Tensor]], index: int) -> Tensor:
    return dit(
        given["x"][index],
        given["t"][index],
        cross_attn_cond_BLD=given["context"][index],
        global_cond_BD=given["globals"][index],
        local_add_cond_BCT=given["local"][index],
    )


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_packed_equals_one_by_one(dit: DiT, backend: str) -> None:
    given = clips()
    with force_backend(backend):
        packed = run_packed(dit, given)
    for index, (row, start) in PLACES.items():
        part = packed[row : row + 1, :, start : start + LENGTHS[index]]
        torch.testing.assert_close(part, run_alone(dit, given, index), atol=1e-5, rtol=0)
    assert torch.equal(packed.mT[segment_ids() < 0], torch.zeros(ROWS * FRAMES - sum(LENGTHS), 64))


def test_packed_gradients_equal_one_by_one(dit: DiT) -> None:
    given = clips()
    weight = dit.transformer.layers[1].get_parameter("self_attn.to_qkv.weight").requires_grad_()
    memory = dit.transformer.memory_tokens.requires_grad_()
    packed = torch.autograd.grad(run_packed(dit, given).square().sum(), (weight, memory))
    loss = sum((run_alone(dit, given, index).square().sum() for index in range(len(LENGTHS))), torch.zeros(()))
    for found, wanted in zip(packed, torch.autograd.grad(loss, (weight, memory)), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    dit.requires_grad_(False)


def test_padding_is_not_looked_at(dit: DiT) -> None:
    given = clips()
    assert torch.equal(run_packed(dit, given, 0.0), run_packed(dit, given, torch.nan))
    mask = torch.arange(30)[None] < torch.tensor([[12]])
    outs = []
    for fill in (0.0, 1e3):
        x, local = (given[name][3].masked_fill(~mask[:, None], fill) for name in ("x", "local"))
        conditions = {"cross_attn_cond_BLD": given["context"][0], "global_cond_BD": given["globals"][0]}
        outs.append(dit(x, given["t"][0], local_add_cond_BCT=local, attention_mask_BT=mask, **conditions)[..., :12])
    short = dit(given["x"][3][..., :12], given["t"][0], local_add_cond_BCT=given["local"][3][..., :12], **conditions)
    assert torch.equal(outs[0], outs[1])
    torch.testing.assert_close(outs[0], short, atol=1e-5, rtol=0)


def test_bad_masks_and_ids_are_refused(dit: DiT) -> None:
    x, t = torch.zeros(2, 64, 6), torch.zeros(2)
    conditions = {"cross_attn_cond_BLD": torch.zeros(2, 25, 768), "global_cond_BD": torch.zeros(2, 768)}
    with pytest.raises(ValueError, match="padding before real frames"):
        dit(x, t, attention_mask_BT=torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6]), **conditions)
    with pytest.raises(ValueError, match="does not fit 2 rows of 6 frames"):
        dit(x, t, attention_mask_BT=torch.ones(2, 5), **conditions)
    with pytest.raises(ValueError, match="several clips in a row need segment_ids"):
        dit(x[:1], t, **conditions)
    with pytest.raises(ValueError, match="not both"):
        dit(x, t, attention_mask_BT=torch.ones(2, 6), segment_ids=torch.zeros(2, 6), **conditions)
    for ids, message in (
        ([[0, 0, 2, -1]], r"-1\.\.1"),
        ([[0, 0, -2, 1]], r"-1\.\.1"),
        ([[0, 0, -1, -1]], r"clips \[1\] have conditions but no frame"),
        ([[0, 1, 0, -1]], "follow one another"),
        ([[1, 1, 0, 0], [0, -1, -1, -1]], "within one row"),
    ):
        with pytest.raises(ValueError, match=message):
            make_packed_layout(torch.tensor(ids), 2, 64, torch.device("cpu"))


def test_checkpointing_changes_nothing_but_memory(dit: DiT) -> None:
    given = clips()
    weight = dit.transformer.layers[0].get_parameter("cross_attn.to_kv.weight").requires_grad_()
    gradients = []
    for switch in (False, True):
        dit.transformer.checkpointing = switch
        gradients.append(torch.autograd.grad(run_packed(dit, given).square().sum(), weight)[0])
    dit.transformer.checkpointing = False
    dit.requires_grad_(False)
    assert torch.equal(*gradients)


def test_bf16_keeps_time_in_fp32() -> None:
    exact = load_checkpoint(ROOT / "plain", parts=("dit",)).dit
    half = load_checkpoint(ROOT / "plain", parts=("dit",), dtype=torch.bfloat16).dit
    given = clips()
    outs = [run_alone(dit, given, 3) for dit in (exact, half)]
    assert outs[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(outs[0].flatten(), outs[1].flatten(), dim=0) > 0.999
    t = torch.tensor([0.50049, 0.5005])  # one and the same in bf16
    x = given["x"][3].expand(2, -1, -1)
    context, global_cond = given["context"][0].expand(2, -1, -1), given["globals"][0].expand(2, -1)
    two = half(x, t, cross_attn_cond_BLD=context, global_cond_BD=global_cond)
    assert not torch.equal(two[0], two[1])
    positions = torch.arange(5000)
    half_rotary = half.to(torch.bfloat16).transformer.rotary_pos_emb(positions)
    assert torch.equal(half_rotary[0], exact.transformer.rotary_pos_emb(positions)[0])
