"""The form in which tensors of an adapter are written."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sa3train.core.errors import AdapterError
from sa3train.core.log import get_logger

logger = get_logger(__name__)


def convert_for_saving(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copy tensors to the CPU in the form in which they are written.

    Args:
        tensors: Tensors by key.
        dtype: Dtype for those in fp32 and fp64; None keeps theirs. Magnitudes are in fp32 then: rounding one to fp16
            changes a weight by as much as a short training. A tensor with values that the dtype cannot represent
            stays in fp32, with a warning in the log.

    Returns:
        Contiguous copies by key.

    Raises:
        AdapterError: A tensor contains NaN or infinity.
    """
    stored = {}
    for key, tensor in tensors.items():
        value = tensor.detach().cpu()
        if not torch.isfinite(value).all():
            raise AdapterError(
                f"{key} contains NaN or infinity, so the adapter is not written. If it was trained, training diverged: "
                f"lower the learning rate."
            )
        if dtype is not None and value.dtype in (torch.float32, torch.float64):
            is_magnitude = "magnitude" in key or key.endswith("dora_scale")
            cast = value.to(torch.float32 if is_magnitude else dtype)
            if torch.isfinite(cast).all():
                value = cast
            else:
                logger.warning("%s has values too large for %s and stays in fp32", key, dtype)
        stored[key] = value.contiguous().clone()
    return stored
