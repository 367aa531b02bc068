"""The frozen base in 8 or 4 bits: weights are stored quantized and dequantized only while a layer uses them.

int8: one scale per row, code = round(W / scale), scale = largest |W| / 127. nf4: blocks of 64 values, each the nearest
of 16 quantiles of a normal distribution times the block's largest |W| (Dettmers et al. 2023, QLoRA, appendix E). fp8:
one scale per row, codes are floating-point numbers of 4 exponent and 3 mantissa bits (e4m3, Micikevicius et al. 2022).

A layer's weight stays the same parameter, whose storage is empty between uses, so everything that reads it (adapter
layers, their cached norms, autograd) works unchanged. One layer is dequantized at a time.

Shapes: O rows, I columns, N all values, K blocks.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sa3train.core.device import move_to_device

_BLOCK_SIZE = 64
MIN_SIZE = 4096
"""Weights with fewer values are not quantized."""
_FP8 = torch.float8_e4m3fn

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass
class QuantizedWeight:
    """A quantized weight.

    Attributes:
        codes: uint8, int8 or fp8.
        scales: float32, per row or block.
        shape: Of the weight.
        dtype: Of the weight.
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scales.nbytes


def quantize_int8(W: Tensor) -> QuantizedWeight:
    """Quantize to one signed byte per value and one fp32 scale per row.

    Args:
        W: The weight.

    Returns:
        Its codes.
    """
    scaled_OI, scale_O1 = _scale_rows(W, 127)
    return QuantizedWeight(scaled_OI.round().to(torch.int8), scale_O1, W.shape, W.dtype)


def dequantize_rows(q: QuantizedWeight) -> Tensor:
    """Dequantize what `quantize_int8` or `quantize_fp8` returned.

    Args:
        q: The codes.

    Returns:
        The weight.
    """
    return (q.codes.float() * q.scales).reshape(q.shape).to(q.dtype)


def quantize_fp8(W: Tensor) -> QuantizedWeight:
    """Quantize to one e4m3 number per value and one fp32 scale per row, which maps the row's largest to e4m3's largest.

    Args:
        W: The weight.

    Returns:
        Its codes.
    """
    scaled_OI, scale_O1 = _scale_rows(W, torch.finfo(_FP8).max)
    return QuantizedWeight(scaled_OI.to(_FP8), scale_O1, W.shape, W.dtype)


def _scale_rows(W: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Rows of a weight, each divided so that its largest |W| becomes `largest`, and the divisors."""
    W_OI = W.detach().reshape(W.shape[0], -1).float()
    scale_O1 = W_OI.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / largest
    return W_OI / scale_O1, scale_O1


def quantize_nf4(W: Tensor) -> QuantizedWeight:
    """Quantize to half a byte per value and one fp32 scale per 64 values; the last block is filled up with zeros.

    Args:
        W: The weight.

    Returns:
        Its codes.
    """
    flat_N = W.detach().reshape(-1).float()
    blocks_KB = torch.nn.functional.pad(flat_N, (0, -len(flat_N) % _BLOCK_SIZE)).view(-1, _BLOCK_SIZE)
    scale_K1 = blocks_KB.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    table = move_to_device(torch.tensor(_NF4), W.device)
    edges = (table[1:] + table[:-1]) / 2
    index_N = torch.bucketize((blocks_KB / scale_K1).reshape(-1), edges).to(torch.uint8)
    return QuantizedWeight(index_N[0::2] << 4 | index_N[1::2], scale_K1, W.shape, W.dtype)


def dequantize_nf4(q: QuantizedWeight) -> Tensor:
    """Dequantize what `quantize_nf4` returned.

    Args:
        q: The codes.

    Returns:
        The weight.
    """
    index_N = torch.stack((q.codes >> 4, q.codes & 15), dim=1).reshape(-1).long()
    table = move_to_device(torch.tensor(_NF4), q.codes.device)
    values_KB = table[index_N].view(-1, _BLOCK_SIZE) * q.scales
    return values_KB.reshape(-1)[: q.shape.numel()].reshape(q.shape).to(q.dtype)


METHODS: dict[str, tuple[Callable[[Tensor], QuantizedWeight], Callable[[QuantizedWeight], Tensor]]] = {
    "int8": (quantize_int8, dequantize_rows),
    "nf4": (quantize_nf4, dequantize_nf4),
    "fp8": (quantize_fp8, dequantize_rows),
}


def list_quantizable_weights(root: nn.Module) -> dict[str, nn.Parameter]:
    """List the Linear and Conv1d weights that are large enough to quantize.

    Args:
        root: The model.

    Returns:
        Weights by module path.
    """
    return {
        path: _get_weight(module)
        for path, module in root.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d) and module.weight.numel() >= MIN_SIZE
    }


def _get_weight(layer: nn.Linear | nn.Conv1d) -> nn.Parameter:
    """The layer's weight, typed as a parameter."""
    assert isinstance(layer.weight, nn.Parameter)
    return layer.weight


def round_weights(root: nn.Module, method: str) -> None:
    """Round each weight to what its codes give back, so that adapters start from the base that is trained on.

    Args:
        root: The model.
        method: "int8", "fp8" or "nf4".
    """
    encode, decode = METHODS[method]
    with torch.no_grad():
        for weight in list_quantizable_weights(root).values():
            weight.copy_(decode(encode(weight)))


class QuantizedBase:
    """Stores the weights of a model quantized from now on; each is dequantized while the layer that owns it runs.

    Make it once the weights are on their device and adapters are injected.

    Args:
        root: The model.
        method: "int8", "fp8" or "nf4".
    """

    def __init__(self, root: nn.Module, method: str) -> None:
        self.method = method
        self._dequantized: nn.Parameter | None = None
        self._quantized: dict[int, QuantizedWeight] = {}
        encode, _ = METHODS[method]
        large = {id(weight) for weight in list_quantizable_weights(root).values()}
        for layer, weight in list_weight_users(root):
            if id(weight) in large:
                self._quantized[id(weight)] = encode(weight)
                weight.data = weight.data.clone()  # memory mapped to a file cannot be released
                weight.untyped_storage().resize_(0)
                layer.register_forward_pre_hook(functools.partial(self._before, weight))
                layer.register_forward_hook(functools.partial(self._after, weight))

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(codes.nbytes for codes in self._quantized.values())

    def dequantize(self, weight: nn.Parameter) -> None:
        """Fill a weight from its codes and empty the one that was filled before.

        Args:
            weight: One of the model's weights.
        """
        if self._dequantized is weight:
            return
        if self._dequantized is not None:
            self._dequantized.untyped_storage().resize_(0)
        codes = self._quantized[id(weight)]
        weight.untyped_storage().resize_(weight.numel() * weight.element_size())
        # Autograd has seen these very values, so its check for in-place changes must not count this write.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
            weight.copy_(METHODS[self.method][1](codes))
        self._dequantized = weight

    def _before(self, weight: nn.Parameter, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.dequantize(weight)

    def _after(self, weight: nn.Parameter, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:  # runs right before the layer's own backward
            output.register_hook(lambda gradient: self.dequantize(weight))


def list_weight_users(root: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    """List the layers whose forward pass reads a weight; an adapted layer stands for the base layer inside it.

    Args:
        root: The model.

    Returns:
        Layers, each with its weight.
    """
    found: list[tuple[nn.Module, nn.Parameter]] = []
    inner: set[int] = set()
    for module in root.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear | nn.Conv1d):
            found.append((module, _get_weight(base)))
            inner.add(id(base))
        elif isinstance(module, nn.Linear | nn.Conv1d) and id(module) not in inner:
            found.append((module, _get_weight(module)))
    return found
