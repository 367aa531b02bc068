"""Wording of numbers and lists, and names of dtypes."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sa3train.core.dtypes import get_dtype, name_dtype
from sa3train.core.safetensors_file import hash_tensors
from sa3train.core.text import (
    compute_relative_norm,
    format_command,
    format_number,
    format_range,
    format_share,
    list_few,
)


def test_numbers_and_lists() -> None:
    assert [format_number(value) for value in (None, 0.123456, 2.0)] == ["-", "0.1235", "2"]
    assert [format_range(values) for values in ([4], [4, 16, 8])] == ["4", "4 to 16"]
    shares = {0.0: "0%", 4.123e-7: "0.0000412%", 0.0005: "0.0500%", 0.1388: "13.9%", 12.345: "1234%", math.inf: "inf%"}
    assert {value: format_share(value) for value in shares} == shares
    assert [list_few(list("abcde")[:n]) for n in (0, 2, 5)] == ["", "a, b", "a, b and 3 more"]


@pytest.mark.parametrize(("name", "quote"), [("posix", "'"), ("nt", '"')])
def test_commands_for_the_shell_of_the_system(monkeypatch: pytest.MonkeyPatch, name: str, quote: str) -> None:
    monkeypatch.setattr("sa3train.core.text.os", SimpleNamespace(name=name, fspath=os.fspath))
    command = format_command(["sa3-train", Path("resume=C:\\my runs"), "name=x"])
    assert command == f"sa3-train {quote}resume=C:\\my runs{quote} name=x"


@pytest.mark.parametrize(("change", "whole", "expected"), [(4.0, 16.0, 0.5), (0.0, 0.0, 0.0), (1.0, 0.0, math.inf)])
def test_relative_norms(change: float, whole: float, expected: float) -> None:
    assert compute_relative_norm(change, whole) == expected


def test_dtypes_by_all_their_names() -> None:
    assert get_dtype("bf16") is get_dtype("BF16") is torch.bfloat16
    assert [name_dtype(dtype) for dtype in (torch.float32, torch.float16, torch.float64)] == ["fp32", "fp16", "float64"]


def test_hashes_depend_on_bytes_and_order() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    assert hash_tensors(["a", one]) == hash_tensors(["a", one.clone()]) != hash_tensors(["a", two])
    assert hash_tensors([one, two]) != hash_tensors([two, one])
