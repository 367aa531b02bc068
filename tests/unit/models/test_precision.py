"""Precision by measuring: auto's rule, its memory, and fp32 products that stay exact."""

import json
from collections.abc import Iterator

import pytest
import torch

from helpers.golden import GOLDEN
from sa3train.core.files import get_cache_dir
from sa3train.models import precision
from sa3train.models.checkpoint import load_autoencoder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing remembered from other tests, and torch's setting as it was."""
    before, rounded = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    precision.get_bf16_speedup.cache_clear()
    precision.enable_fast_fp32_matmul.cache_clear()
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = rounded
    precision.get_bf16_speedup.cache_clear()
    precision.enable_fast_fp32_matmul.cache_clear()


@pytest.mark.parametrize(("gain", "expected"), [(2.0, "bf16"), (1.3, "bf16"), (1.29, "fp32"), (0.1, "fp32")])
def test_auto_takes_bf16_on_a_cpu_where_it_is_worth_while(
    gain: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "get_bf16_speedup", lambda device: gain)
    name, why = precision.choose_precision(torch.device("cpu"))
    assert name == expected
    assert f"{gain:.1f} times" in why


def test_auto_is_fp32_where_bf16_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "find_device_fault", lambda device, dtype: "BFloat16 is not supported on MPS")
    monkeypatch.setattr(precision, "get_bf16_speedup", lambda device: pytest.fail("measured"))
    name, why = precision.choose_precision(torch.device("mps"))
    assert name == "fp32" and "BFloat16 is not supported on MPS" in why


def test_the_gain_is_measured_once_per_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("SA3TRAIN_CACHE", str(tmp_path))
    measured: list[float] = []

    def measure(device: torch.device) -> float:
        measured.append(2.5)
        return 2.5

    monkeypatch.setattr(precision, "measure_bf16_speedup", measure)
    assert precision.get_bf16_speedup(CPU) == 2.5
    precision.get_bf16_speedup.cache_clear()
    assert precision.get_bf16_speedup(CPU) == 2.5
    assert measured == [2.5]
    (kept,) = (get_cache_dir() / "precision").iterdir()
    kept.write_text("not JSON", encoding="utf-8")
    precision.get_bf16_speedup.cache_clear()
    assert precision.get_bf16_speedup(CPU) == 2.5
    assert len(measured) == 2
    assert json.loads(kept.read_text(encoding="utf-8")) == {"bf16_over_fp32": 2.5}


def test_measuring_gives_a_positive_ratio() -> None:
    assert precision.measure_bf16_speedup(CPU, rounds=1) > 0


def test_fp32_products_are_exact_whichever_library_does_them() -> None:
    precision.enable_fast_fp32_matmul()
    assert precision.measure_matmul_error() < 1e-5


def test_a_setting_that_torch_refuses_to_read_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the released project's `allow_tf32 = False` in the same process (torch 2.14)."""
    monkeypatch.setattr(precision, "_read_cpu_field", lambda key: {"vendor_id": "AuthenticAMD"}.get(key, ""))
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        assert not precision.enable_fast_fp32_matmul()
        precision.disable_tf32_convolutions()
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({"vendor_id": "GenuineIntel"}, "highest"),
        ({"vendor_id": "AuthenticAMD", "flags": "amx_bf16"}, "highest"),
        ({"vendor_id": "AuthenticAMD"}, "high"),  # the user's own choice
        ({"vendor_id": "AuthenticAMD"}, "highest"),  # the permission is taken back where products turn out rounded
    ],
)
def test_products_are_torchs_own(fields: dict[str, str], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_read_cpu_field", lambda key: fields.get(key, ""))
    monkeypatch.setattr(precision, "measure_matmul_error", lambda: 1e-3)
    torch.set_float32_matmul_precision(chosen)
    assert not precision.enable_fast_fp32_matmul()
    assert torch.get_float32_matmul_precision() == chosen


def test_loading_leaves_no_convolution_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen, expected in (("high", True), ("highest", False)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda known=chosen: known)
        torch.backends.cudnn.allow_tf32 = True
        load_autoencoder(GOLDEN / "plain")
        assert torch.backends.cudnn.allow_tf32 is expected
