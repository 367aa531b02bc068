"""The floating-point dtypes of weights, by all their names. Imports torch on first use only: `--help` needs none."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": ("float32", "F32"), "bf16": ("bfloat16", "BF16"), "fp16": ("float16", "F16")}
"""Our name, which settings and flags use: torch's name, and the name in safetensors headers."""

PRECISIONS = ("auto", *DTYPES, "int8")
"""What models generate in: a dtype, what the device computes fastest, or products of 8-bit integers on a CPU."""

SAFETENSORS_DTYPES = {code: name for name, (_, code) in DTYPES.items()}
"""Name in safetensors headers: our name."""


def get_dtype(name: str) -> "torch.dtype":
    """Get a torch dtype by name.

    Args:
        name: Ours ("fp32", "bf16" or "fp16"), or that of safetensors headers ("F32", "BF16" or "F16").

    Returns:
        The dtype. An unknown name is a `KeyError`: check it against `DTYPES` where users choose.
    """
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[SAFETENSORS_DTYPES.get(name, name)][0])
    return dtype


def name_dtype(dtype: "torch.dtype") -> str:
    """Name a torch dtype as settings do.

    Args:
        dtype: Any dtype.

    Returns:
        Our name ("bf16"), or torch's ("float64") for other dtypes.
    """
    torch_name = str(dtype).removeprefix("torch.")
    return next((name for name, (theirs, _) in DTYPES.items() if theirs == torch_name), torch_name)
