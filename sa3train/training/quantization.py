"""The frozen base in 8 or 4 bits: weights are kept as codes and made full only while a layer uses them.

int8: one scale per row, code = round(W / scale), scale = largest |W| / 127. nf4: blocks of 64 values, each the nearest
of 16 quantiles of a normal distribution times the block's largest |W| (Dettmers et al. 2023, QLoRA, appendix E). fp8:
one scale per row, codes are floating-point numbers of 4 exponent and 3 mantissa bits (e4m3, Micikevicius et al. 2022).

A layer's weight stays one and the same parameter whose storage is empty between uses, so everything that reads it
(adapter layers, their cached norms, autograd) works unchanged. One layer is full at a time.

Shapes: O rows, I columns, N all values, K blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sa3train.core.device import to_device

BLOCK = 64
LEAST = 4096
"""Weights of fewer values stay as they are."""
FP8 = torch.float8_e4m3fn

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass
class Codes:
    """A weight in few bits: `codes` (uint8, int8 or fp8), `scales`, and what it was."""

    codes: Tensor
    scales: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scales.nbytes


def to_int8(W: Tensor) -> Codes:
    """One signed byte per value and one fp32 scale per row."""
    W_OI = W.detach().reshape(W.shape[0], -1).float()
    scale_O1 = W_OI.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return Codes((W_OI / scale_O1).round().to(torch.int8), scale_O1, W.shape, W.dtype)


def from_scaled_rows(q: Codes) -> Tensor:
    """The weight that `to_int8` or `to_fp8` kept."""
    return (q.codes.float() * q.scales).reshape(q.shape).to(q.dtype)


def to_fp8(W: Tensor) -> Codes:
    """One e4m3 number per value and one fp32 scale per row, which brings the row's largest to e4m3's largest."""
    W_OI = W.detach().reshape(W.shape[0], -1).float()
    scale_O1 = W_OI.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / torch.finfo(FP8).max
    return Codes((W_OI / scale_O1).to(FP8), scale_O1, W.shape, W.dtype)


def to_nf4(W: Tensor) -> Codes:
    """Half a byte per value and one fp32 scale per 64 values; the last block is filled up with zeros."""
    flat_N = W.detach().reshape(-1).float()
    blocks_KB = torch.nn.functional.pad(flat_N, (0, -len(flat_N) % BLOCK)).view(-1, BLOCK)
    scale_K1 = blocks_KB.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    table = to_device(torch.tensor(NF4), W.device)
    edges = (table[1:] + table[:-1]) / 2
    index_N = torch.bucketize((blocks_KB / scale_K1).reshape(-1), edges).to(torch.uint8)
    return Codes(index_N[0::2] << 4 | index_N[1::2], scale_K1, W.shape, W.dtype)


def from_nf4(q: Codes) -> Tensor:
    """The weight that `to_nf4` kept."""
    index_N = torch.stack((q.codes >> 4, q.codes & 15), dim=1).reshape(-1).long()
    table = to_device(torch.tensor(NF4), q.codes.device)
    values_KB = table[index_N].view(-1, BLOCK) * q.scales
    return values_KB.reshape(-1)[: q.shape.numel()].reshape(q.shape).to(q.dtype)


KINDS: dict[str, tuple[Callable[[Tensor], Codes], Callable[[Codes], Tensor]]] = {
    "int8": (to_int8, from_scaled_rows),
    "nf4": (to_nf4, from_nf4),
    "fp8": (to_fp8, from_scaled_rows),
}


def weights_of(root: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of every Linear and Conv1d in `root` that are worth keeping in few bits, by module path."""
    found = {}
    for path, module in root.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d) and module.weight.numel() >= LEAST:
            found[path] = weight_parameter(module)
    return found


def weight_parameter(layer: nn.Linear | nn.Conv1d) -> nn.Parameter:
    """The layer's weight, known to be a parameter."""
    assert isinstance(layer.weight, nn.Parameter)
    return layer.weight


def round_weights(root: nn.Module, kind: str) -> None:
    """Set each weight to what its codes will give back, so that adapters start from the base that is trained on."""
    encode, decode = KINDS[kind]
    with torch.no_grad():
        for weight in weights_of(root).values():
            weight.copy_(decode(encode(weight)))


class CodedWeights:
    """Keeps the weights of `root` as codes from now on; each is full while the layer that owns it runs.

    Make it once the weights are on their device, after adapters are in.
    """

    def __init__(self, root: nn.Module, kind: str) -> None:
        self.kind = kind
        self._full: nn.Parameter | None = None
        self._codes: dict[int, Codes] = {}
        encode, _ = KINDS[kind]
        wanted = {id(weight) for weight in weights_of(root).values()}
        for layer, weight in users(root):
            if id(weight) in wanted:
                self._codes[id(weight)] = encode(weight)
                weight.data = weight.data.clone()  # memory that a file is mapped to cannot be given back
                weight.untyped_storage().resize_(0)
                layer.register_forward_pre_hook(self._before(weight))
                layer.register_forward_hook(self._after(weight))

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(codes.nbytes for codes in self._codes.values())

    def make_full(self, weight: nn.Parameter) -> None:
        """Fill `weight` from its codes and empty the one that was full before."""
        if self._full is weight:
            return
        if self._full is not None:
            self._full.untyped_storage().resize_(0)
        codes = self._codes[id(weight)]
        weight.untyped_storage().resize_(weight.numel() * weight.element_size())
        # The values are the ones autograd has seen, so its check for changes in place must not count this.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
            weight.copy_(KINDS[self.kind][1](codes))
        self._full = weight

    def _before(self, weight: nn.Parameter) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.make_full(weight)

        return hook

    def _after(self, weight: nn.Parameter) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:  # runs right before the layer's own backward
                output.register_hook(lambda gradient: self.make_full(weight))

        return hook


def users(root: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    """Each layer whose forward reads a weight, with that weight: an adapted layer stands for the base inside it."""
    found: list[tuple[nn.Module, nn.Parameter]] = []
    inner: set[int] = set()
    for module in root.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear | nn.Conv1d):
            found.append((module, weight_parameter(base)))
            inner.add(id(base))
        elif isinstance(module, nn.Linear | nn.Conv1d) and id(module) not in inner:
            found.append((module, weight_parameter(module)))
    return found
