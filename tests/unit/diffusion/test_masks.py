"""Padding and inpainting masks beyond the recorded cases."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sa3train.diffusion import masks


@given(kind=st.sampled_from(sorted(masks.MASK_KINDS)), length=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_every_kind_holds_for_every_length(kind: str, length: int, seed: int) -> None:
    padding = masks.build_attention_mask(torch.tensor([length, 0]), 60)
    mask = masks.draw_inpainting_masks(padding, random.Random(seed), {kind: 1.0})
    assert mask.shape == (2, 1, 60)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert mask[0, 0, length:].sum() == 0
    assert mask[1].sum() == 0


@given(length=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_spans_generate_at_least_a_fifth(length: int, seed: int) -> None:
    kept = masks._keep_around_spans(length, random.Random(seed))
    assert (kept == 0).sum() >= 1


def test_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="sideways"):
        masks.draw_inpainting_masks(torch.ones(1, 4, dtype=torch.bool), random.Random(0), {"sideways": 1.0})


def test_a_region_is_zero_and_what_lies_past_the_duration_too() -> None:
    mask = masks.build_region_mask([(1.0, 2.0), (3.0, 3.5)], 4.0, 100, 600, 60)
    kept = [1.0] * 10 + [0.0] * 10 + [1.0] * 10 + [0.0] * 5 + [1.0] * 5 + [0.0] * 20
    assert mask.tolist() == kept


def test_silence_never_shortens_and_stays_within_the_frames() -> None:
    padding = masks.build_attention_mask(torch.tensor([3, 10, 20]), 20)
    extended = masks.extend_into_silence(padding, torch.Generator().manual_seed(0), mean_seconds=30.0)
    assert bool((extended | ~padding).all())
    assert extended[2].sum() == 20
